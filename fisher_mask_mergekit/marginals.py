"""Sums over rows and over columns of the squares of every sample's gradients, without the gradients where that is less work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.layer_gradients import Product

_T = TypeVar("_T")

_CHUNK = 2**20
"""Elements that are made at a time on a processor, few enough to stay near it; elsewhere more."""

_GLANCE = 8
"""Elements of a token's gradient that are looked at first."""

_WORTH_TAKING = 0.8
"""Tokens that no gradient reaches are left out where the others are less than this share."""


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


class Marginals:
    r"""Of their squares, only the sums over each row and over each column.

    .. math:: r_i = \sum_j G_{ij}^2, \qquad c_j = \sum_i G_{ij}^2

    A matrix's gradient :math:`G = \sum_t g_t x_t^T` over a sample's T tokens need not be made for them: with
    :math:`K_{st} = x_s \cdot x_t` and :math:`L_{st} = g_s \cdot g_t`,

    .. math:: r_i = \sum_{s,t} K_{st} \, g_{s,i} g_{t,i}, \qquad c_j = \sum_{s,t} L_{st} \, x_{s,j} x_{t,j}

    which takes :math:`2 T^2 (R + C)` multiplications, where G takes :math:`T R C`. Whichever is less is done.

    Args:
        splits: Of all parameters.
    """

    def __init__(self, splits: Mapping[str, Split]) -> None:
        self._splits = splits

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
        step = min(_samples_at_a_time(tokens, self._splits[one.name], _chunk(like)) for one in products)
        sparse = [_is_sparse(one.gradient) for one in products]
        for first in range(0, call.samples, step):
            part = slice(first, min(first + step, call.samples))
            rows, count = slice(part.start * each, part.stop * each), part.stop - part.start
            given = _side(call.given(rows), count, tokens, wide)
            factor = None if weight is None else weight[part, None]
            for one, total, is_sparse in zip(products, totals, sparse, strict=True):
                pair = _side(one.gradient[rows], count, tokens, wide), given
                left, right = _in_order(one, *(_reached(*pair) if is_sparse else pair))
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


class TokenMarginals(Marginals):
    r"""The same of the squares of every token's gradient by itself, :math:`g_t x_t^T`, where a gradient is a matrix's.

    .. math:: r_i = \sum_t g_{t,i}^2 |x_t|^2, \qquad c_j = \sum_t |g_t|^2 x_{t,j}^2
    """

    def add_matrices(
        self, products: Sequence[Product], totals: Sequence[Tensor], weight: Tensor | None
    ) -> None:
        """Linear modules' matrices, some tokens at a time; what the modules were given is looked at once."""
        call, like = products[0].call, products[0].gradient
        if not like.numel():
            return
        wide = torch.promote_types(like.dtype, torch.float32)
        outputs = [one.gradient.shape[-1] for one in products]
        width = totals[0].shape[-1] - outputs[0]  # Of the input.
        held = like[..., 0].numel() * (width + sum(outputs))  # If all were made at once.
        step = max(1, _chunk(like) * len(like) // held)
        rows = [like.new_zeros(1, size, dtype=wide) for size in outputs]
        columns = like.new_zeros(len(products), width, dtype=wide)
        if weight is not None:
            weight = weight.repeat_interleave(like[..., 0].numel() // len(weight)).reshape(len(like), -1)
        for first in range(0, len(like), step):
            part = slice(first, first + step)
            given = _squares(call.given(part), wide)
            found = [_squares(one.gradient[part], wide) for one in products]
            lengths = torch.stack([given.sum(1), *(squares.sum(1) for squares in found)])
            if weight is not None:
                lengths *= weight[part].flatten()
            for sums, squares in zip(rows, found, strict=True):
                sums.addmm_(lengths[:1], squares)  # Faster than of a vector.
            columns.addmm_(lengths[1:], given)
        for one, total, row_sums, column_sums in zip(products, totals, rows, columns, strict=True):
            total[0] += torch.cat(_in_order(one, row_sums[0], column_sums))


def _in_order(product: Product, output: _T, given: _T) -> tuple[_T, _T]:
    """What is of a module's output and of its input: which of its matrix's rows, which of its columns."""
    return (given, output) if product.call.kind == "transposed" else (output, given)


def _chunk(values: Tensor) -> int:
    """Elements to make at a time."""
    return _CHUNK if values.device.type == "cpu" else _CHUNK * 2**4


def _squares(values: Tensor, wide: torch.dtype) -> Tensor:
    """Of rows of tokens, ``[T, D]``."""
    return values.flatten(0, -2).to(wide).square()


def _samples_at_a_time(tokens: int, split: Split, chunk: int) -> int:
    """How many, at least one."""
    without = _without(tokens, split.rows, split.columns)
    each = tokens * max(split.rows, split.columns) if without else split.rows * split.columns
    return max(1, chunk // max(1, each))


def _side(values: Tensor, samples: int, tokens: int, wide: torch.dtype) -> Side:
    """Of rows of one sample after the other."""
    return Side(values.reshape(samples, tokens, values.shape[-1]).to(wide))


def _is_sparse(gradient: Tensor) -> bool:
    """Whether it may be that no gradient reaches many of the tokens: padding, and of a last layer perhaps all but one."""
    tokens = gradient.flatten(0, -2)[:, :_GLANCE]
    return int(tokens.abs().amax(1).count_nonzero()) < _WORTH_TAKING * len(tokens)


def _reached(gradient: Side, given: Side) -> tuple[Side, Side]:
    """Both without the tokens at either end that no gradient reaches, where those are many."""
    values = gradient.values
    there = values[..., :_GLANCE].abs().amax((0, 2)).nonzero().flatten().tolist()
    first, end = (there[0], there[-1] + 1) if there else (0, 0)
    missed = any(bool(torch.linalg.vector_norm(rest)) for rest in (values[:, :first], values[:, end:]))
    if missed or end - first >= _WORTH_TAKING * values.shape[1]:
        return gradient, given
    return Side(values[:, first:end]), Side(given.values[:, first:end])


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
