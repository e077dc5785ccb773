"""Sums over rows and over columns of the squares of every sample's gradients, without the gradients where that is less work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.layer_gradients import Product

_CHUNK = 2**18
"""Elements that are made at a time on a processor, whose cache they fit in; elsewhere many times more."""

_GLANCE = 8
"""Elements of a token's gradient, in one sample, that are looked at first."""

_WORTH_TAKING = 0.8
"""The tokens that a gradient reaches are taken out of the others where they are less than this share."""


def row_axes(model: nn.Module) -> dict[str, int]:
    """By parameter, the axis that its rows lie along: the last but one; but of a convolution, the first."""
    convolutions = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _ConvNd)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: 0 if id(parameter) in convolutions else max(0, parameter.ndim - 2)
        for name, parameter in model.named_parameters()
    }


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two matrices whose product a gradient is, ``[B, T, D]``, and what is made of it once for all that it meets."""

    values: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """Its tokens' products with each other, ``[B, T, T]``."""
        return self.values @ self.values.mT

    @cached_property
    def squares(self) -> Tensor:
        """Of its elements, ``[B, T, D]``."""
        return self.values.square()

    @cached_property
    def lengths(self) -> Tensor:
        """Of its tokens, squared: ``[B, T]``."""
        return self.squares.sum(2)


class Marginals:
    r"""Of their squares, only the sums over each row and over each column.

    .. math:: r_i = \sum_j G_{ij}^2, \qquad c_j = \sum_i G_{ij}^2

    A matrix's gradient :math:`G = \sum_t g_t x_t^T` over a sample's T tokens need not be made for them: with
    :math:`K_{st} = x_s \cdot x_t` and :math:`L_{st} = g_s \cdot g_t`,

    .. math:: r_i = \sum_{s,t} K_{st} \, g_{s,i} g_{t,i}, \qquad c_j = \sum_{s,t} L_{st} \, x_{s,j} x_{t,j}

    which takes :math:`2 T^2 (R + C)` multiplications, where G takes :math:`T R C`. Whichever is less is done.

    Args:
        splits: Of all parameters.
        by_token: Whether a matrix's squares are those of every token's gradient by itself, :math:`g_t x_t^T`, for which
            :math:`r_i = \sum_t g_{t,i}^2 |x_t|^2` and :math:`c_j = \sum_t |g_t|^2 x_{t,j}^2`.
    """

    def __init__(self, splits: Mapping[str, Split], *, by_token: bool = False) -> None:
        self._splits = splits
        self._by_token = by_token

    def zeros(self, name: str, parameter: Tensor) -> Tensor:
        """Of the factors' shape; in float64, where the device has that."""
        dtype = torch.float32 if parameter.device.type == "mps" else torch.float64
        return torch.zeros(self._splits[name].packed, dtype=dtype, device=parameter.device)

    def add(self, name: str, total: Tensor, gradients: Tensor, weight: Tensor | None) -> None:
        """Several samples' gradients, which are small."""
        squares = gradients.to(total.dtype).square()
        if weight is not None:
            squares = squares * weight.reshape(-1, *[1] * (squares.ndim - 1))
        self._add_squares(name, total, squares.sum(0))

    def add_one(self, name: str, total: Tensor, gradient: Tensor, weight: Tensor | None) -> None:
        """A single sample's gradient."""
        squares = gradient.square()
        self._add_squares(name, total, squares if weight is None else squares.mul_(weight))

    def _add_squares(self, name: str, total: Tensor, squares: Tensor) -> None:
        split = self._splits[name]
        squares = squares.reshape(split.groups, split.rows, split.columns)
        total[:, : split.rows] += squares.sum(2)
        total[:, split.rows :] += squares.sum(1)

    def add_matrices(
        self, products: Sequence[Product], totals: Sequence[Tensor], weight: Tensor | None
    ) -> None:
        """Linear modules' matrices, several samples at a time; what the modules were given is looked at once."""
        call, like = products[0].call, products[0].gradient
        wide = torch.promote_types(like.dtype, torch.float32)
        each = len(like) // call.samples
        tokens = like[:each].numel() // like.shape[-1]
        step = min(
            _samples_at_a_time(tokens, self._splits[one.name], like.device.type, by_token=self._by_token)
            for one in products
        )
        for first in range(0, call.samples, step):
            part = slice(first, min(first + step, call.samples))
            rows, count = slice(part.start * each, part.stop * each), part.stop - part.start
            given = _side(call.given(rows), count, tokens, wide)
            factor = None if weight is None else weight[part, None]
            for one, total in zip(products, totals, strict=True):
                pair = _side(one.gradient[rows], count, tokens, wide), given
                pair = pair if self._by_token else _reached(*pair)
                left, right = pair[::-1] if one.call.kind == "transposed" else pair
                if self._by_token:
                    total[0] += torch.cat(token_marginals(left, right, factor)).to(total.dtype)
                    continue
                sums = torch.cat(marginals(left, right), 1).to(total.dtype)
                total[0] += (sums if factor is None else sums * factor).sum(0)

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
        if weight is not None:
            squares *= weight[samples, None]
        total[0].index_add_(0, rows, squares.sum(1, dtype=total.dtype))
        total[0, self._splits[name].rows :] += squares.sum(0, dtype=total.dtype)


def _samples_at_a_time(tokens: int, split: Split, device: str, *, by_token: bool) -> int:
    """How many, at least one."""
    without = by_token or _without(tokens, split.rows, split.columns)
    each = tokens * max(split.rows, split.columns) if without else split.rows * split.columns
    return max(1, (_CHUNK if device == "cpu" else _CHUNK * 2**6) // max(1, each))


def _side(values: Tensor, samples: int, tokens: int, wide: torch.dtype) -> Side:
    """Of rows of one sample after the other."""
    return Side(values.reshape(samples, tokens, values.shape[-1]).to(wide))


def _reached(gradient: Side, given: Side) -> tuple[Side, Side]:
    """Both without the tokens that no gradient reaches, where those are many: padding, and of a last layer perhaps all but one."""
    values = gradient.values
    least = values[0, :, :_GLANCE].abs().amax(1).count_nonzero()
    if least >= _WORTH_TAKING * values.shape[1]:
        return gradient, given
    there = torch.linalg.vector_norm(values, dim=2).amax(0).nonzero().flatten()
    if len(there) >= _WORTH_TAKING * values.shape[1]:
        return gradient, given
    return Side(values[:, there]), Side(given.values[:, there])


def _without(tokens: int, rows: int, columns: int) -> bool:
    """Whether the sums take fewer multiplications without the products."""
    return 2 * tokens * (rows + columns) < rows * columns


def marginals(left: Side, right: Side) -> tuple[Tensor, Tensor]:
    """Row and column sums ``[B, R]``, ``[B, C]`` of the squares of the products of ``[B, T, R]`` and ``[B, T, C]``."""
    if not _without(left.values.shape[1], left.values.shape[2], right.values.shape[2]):
        squares = (left.values.mT @ right.values).square_()
        return squares.sum(2), squares.sum(1)
    rows = (right.gram @ left.values).mul_(left.values).sum(1)
    columns = (left.gram @ right.values).mul_(right.values).sum(1)
    return rows.clamp_(min=0), columns.clamp_(min=0)  # What is rounded may fall below.


def token_marginals(left: Side, right: Side, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row and column sums ``[R]``, ``[C]`` of the squares of all tokens' products, each token ``[R]`` and ``[C]`` by itself.

    Args:
        left: ``[B, T, R]``.
        right: ``[B, T, C]``.
        weight: Of each sample, ``[B, 1]``.
    """
    beside, above = right.lengths, left.lengths
    if weight is not None:
        beside, above = beside * weight, above * weight
    return beside.flatten() @ left.squares.flatten(0, 1), above.flatten() @ right.squares.flatten(0, 1)
