"""Sums over rows and over columns of the squares of every sample's gradients, without the gradients where that is less work."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.layer_gradients import Call

_CHUNK = 2**18
"""Elements that are made at a time on a processor, whose cache they fit in; elsewhere many times more."""


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
        self._marginals = token_marginals if by_token else marginals

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
        self, name: str, total: Tensor, call: Call, gradient: Tensor, weight: Tensor | None
    ) -> None:
        """A linear module's matrix, several samples at a time."""
        given, back = (value.reshape(call.samples, -1, value.shape[-1]) for value in (call.given(), gradient))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        for part in _parts(given, back):
            pair = [value.to(wide) for value in _reached(given[part], back[part])]
            sums = torch.cat(self._marginals(*(pair if call.kind == "transposed" else pair[::-1])), 1)
            sums = sums.to(total.dtype)
            total[0] += (sums if weight is None else sums * weight[part, None]).sum(0)

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


def _parts(one: Tensor, other: Tensor) -> list[slice]:
    """Samples to take at a time, at least one."""
    samples, tokens, width = one.shape
    each = tokens * max(width, other.shape[2]) if _without(one, other) else width * other.shape[2]
    step = max(1, (_CHUNK if one.device.type == "cpu" else _CHUNK * 2**6) // max(1, each))
    return [slice(first, first + step) for first in range(0, samples, step)]


def _reached(given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the tokens that no gradient reaches: padding, and of a last layer perhaps all but one."""
    there = torch.linalg.vector_norm(back, dim=2).amax(0).nonzero().flatten()
    if len(there) == back.shape[1]:
        return given, back
    return given[:, there], back[:, there]


def _without(left: Tensor, right: Tensor) -> bool:
    """Whether the sums take fewer multiplications without the products."""
    (_, tokens, rows), columns = left.shape, right.shape[2]
    return 2 * tokens * (rows + columns) < rows * columns


def marginals(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums ``[B, R]``, ``[B, C]`` of the squares of the products of ``[B, T, R]`` and ``[B, T, C]``."""
    if not _without(left, right):
        squares = (left.mT @ right).square_()
        return squares.sum(2), squares.sum(1)
    rows = ((right @ right.mT) @ left).mul_(left).sum(1)
    columns = ((left @ left.mT) @ right).mul_(right).sum(1)
    return rows.clamp_(min=0), columns.clamp_(min=0)  # What is rounded may fall below.


def token_marginals(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the products of the tokens ``[R]`` and ``[C]``, each by itself."""
    rows, columns = left.square(), right.square()
    sums = rows.sum(2), columns.sum(2)
    return (sums[1][:, None] @ rows)[:, 0], (sums[0][:, None] @ columns)[:, 0]
