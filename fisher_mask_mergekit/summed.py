"""What is summed over samples of every parameter's gradients."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisher_mask_mergekit.blocks import wide_dtype
from fisher_mask_mergekit.layer_gradients import Product, matrices


class Summed(Protocol):
    """Adds to a parameter's sum what it takes of gradients, each sample's times its weight if there is one."""

    def zeros(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter's sum over no samples."""

    def add(self, name: str, total: Tensor, gradients: Tensor, weight: Tensor | None) -> None:
        """Add several samples' gradients ``[B, ...]`` with weights ``[B]``."""

    def add_one(self, name: str, total: Tensor, gradient: Tensor, weight: Tensor | None) -> None:
        """Add a single sample's gradient, with a weight ``[]``."""

    def add_matrices(
        self, products: Sequence[Product], totals: Sequence[Tensor], weight: Tensor | None
    ) -> None:
        """Add the gradients of the matrices of linear modules that were given the same."""

    def add_rows(
        self,
        name: str,
        total: Tensor,
        samples: Tensor,
        rows: Tensor,
        gradients: Tensor,
        weight: Tensor | None,
    ) -> None:
        """Add gradients of an embedding, as :func:`~fisher_mask_mergekit.layer_gradients.embedding_rows` has them."""


class Squares:
    """Their squares: one number per element."""

    def zeros(self, name: str, parameter: Tensor) -> Tensor:
        """Of the parameter's shape."""
        return torch.zeros_like(parameter, dtype=wide_dtype(parameter), requires_grad=False)

    def add(self, name: str, total: Tensor, gradients: Tensor, weight: Tensor | None) -> None:
        """Several samples' gradients."""
        squares = gradients.square()
        if weight is not None:
            squares = squares * weight.reshape(-1, *[1] * total.ndim)
        total += squares.sum(0)

    def add_one(self, name: str, total: Tensor, gradient: Tensor, weight: Tensor | None) -> None:
        """A single sample's gradient."""
        total.addcmul_(gradient, gradient if weight is None else gradient * weight)

    def add_matrices(
        self, products: Sequence[Product], totals: Sequence[Tensor], weight: Tensor | None
    ) -> None:
        """Linear modules' matrices, one sample after the other."""
        given = products[0].call.given()
        for product, total in zip(products, totals, strict=True):
            for sample, found in enumerate(matrices(product.call, product.gradient, given)):
                self.add_one(product.name, total, found, None if weight is None else weight[sample])

    def add_rows(
        self,
        name: str,
        total: Tensor,
        samples: Tensor,
        rows: Tensor,
        gradients: Tensor,
        weight: Tensor | None,
    ) -> None:
        """Rows of an embedding."""
        squares = gradients.square()
        total.index_add_(0, rows, squares if weight is None else squares * weight[samples, None])
