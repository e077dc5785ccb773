"""Tensors made block by block: what is computed wide is never a whole tensor."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Index = tuple[slice, ...]
"""Where in a tensor a block is; what it leaves out is whole."""

Add = Callable[[Index, Sequence[Tensor], Tensor], None]
"""Given where a block is, each input's and zeros in the dtype computed in, add what the result is there."""

CPU_BYTES = 2 << 20
"""Of a block on a CPU, in the dtype computed in: small enough for a core's cache."""

DEVICE_BYTES = 64 << 20
"""On other devices: large enough to be worth starting a kernel for."""


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What a tensor's sums are computed in: float32, or float64 if that is what it is of."""
    return torch.promote_types(tensor.dtype, torch.float32)


def in_blocks(tensors: Sequence[Tensor], add: Add) -> Tensor:
    """A tensor of the inputs' shape, dtype and device, computed in :func:`wide_dtype` and rounded once.

    Args:
        tensors: The inputs, all of one shape and dtype. Not changed.
        add: Computes a block.
    """
    first, wide = tensors[0], wide_dtype(tensors[0])
    result = torch.empty_like(first)
    size = CPU_BYTES if first.device.type == "cpu" else DEVICE_BYTES
    for index in blocks(first.shape, size // wide.itemsize):
        block = result[index]
        total = block.zero_() if block.dtype == wide else torch.zeros_like(block, dtype=wide)
        add(index, [tensor[index] for tensor in tensors], total)
        if total is not block:
            block.copy_(total)
    return result


def blocks(shape: Sequence[int], limit: int) -> Iterator[Index]:
    """The blocks that a tensor of this shape falls into, each of at most ``limit`` elements, in row-major order."""
    if torch.Size(shape).numel() <= limit:
        yield ()
        return
    row = torch.Size(shape[1:]).numel()
    step = max(1, limit // row)
    for start in range(0, shape[0], step):
        for rest in blocks(shape[1:], limit):
            yield slice(start, start + step), *rest
