"""Matrices of rank one: a tensor's Fisher information by the means of its rows and of its columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fisher_mask_mergekit.blocks import Index


@dataclass(frozen=True)
class Split:
    """How a tensor's elements, in row-major order, fall into ``groups`` matrices of ``rows`` times ``columns``."""

    groups: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int], axis: int) -> "Split":
        """That of a tensor whose rows lie along an axis; a vector's elements are rows of one column."""
        shape = tuple(shape) or (1,)
        return cls(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))

    @property
    def packed(self) -> tuple[int, int]:
        """The shape of its factors: of every matrix, what belongs to its rows, then what belongs to its columns."""
        return self.groups, self.rows + self.columns


@dataclass(frozen=True)
class Factors:
    """Two tensors whose product is a third, to whose shape they broadcast.

    Attributes:
        rows: With an axis of 1 wherever it does not depend on it.
        columns: Likewise.
    """

    rows: Tensor
    columns: Tensor

    def block(self, index: Index = ()) -> Tensor:
        """The product, or a block of it."""
        return _part(self.rows, index) * _part(self.columns, index)


def _part(factor: Tensor, index: Index) -> Tensor:
    return factor[
        tuple(place if size > 1 else slice(None) for place, size in zip(index, factor.shape, strict=False))
    ]


def factors_of(packed: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    r"""Means of rows :math:`r_i` ``[G, R]``, and those of columns over their mean :math:`c_j / \bar c` ``[G, C]``; float64."""
    rows, columns = packed.double().split((split.rows, split.columns), 1)
    relative = (columns / columns.mean(1, keepdim=True)).nan_to_num_(nan=0.0)
    return rows.contiguous(), relative  # As `piece` takes them.


def piece(
    factors: tuple[Tensor, Tensor], split: Split, shape: Sequence[int], offset: int, strides: Sequence[int]
) -> Factors | None:
    """The factors of what :func:`torch.as_strided` would take out of their product.

    Args:
        factors: ``[G, R]`` and ``[G, C]``.
        split: Of the product.
        shape: What is taken.
        offset: Where its first element is, in row-major order.
        strides: How far apart its neighbours along each axis are.

    Returns:
        None if its elements are no product of these: where moving along an axis leads from a row into the next.
    """
    first = _digits(offset, split)
    steps = [
        _digits(step, split) if size > 1 else (0, 0, 0) for size, step in zip(shape, strides, strict=True)
    ]
    last = [
        start + sum((size - 1) * step[digit] for size, step in zip(shape, steps, strict=True))
        for digit, start in enumerate(first)
    ]
    if last[1] >= max(1, split.rows) or last[2] >= max(1, split.columns):
        return None
    rows, columns = (
        [step[0] * width + step[digit] for step in steps]
        for digit, width in ((1, split.rows), (2, split.columns))
    )
    of_rows = [size if row else 1 for size, row in zip(shape, rows, strict=True)]
    of_columns = [
        size if column or not row else 1 for size, row, column in zip(shape, rows, columns, strict=True)
    ]
    return Factors(
        factors[0].as_strided(of_rows, rows, first[0] * split.rows + first[1]),
        factors[1].as_strided(of_columns, columns, first[0] * split.columns + first[2]),
    )


def _digits(place: int, split: Split) -> tuple[int, int, int]:
    """Matrix, row and column of an element, told by its place in row-major order."""
    matrix, inside = divmod(place, max(1, split.rows * split.columns))
    return matrix, *divmod(inside, max(1, split.columns))
