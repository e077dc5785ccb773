"""Activations times their gradients, without keeping them: remade from what autograd keeps anyway."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Product = Callable[[slice, Tensor], Tensor]
"""Some rows (along the first axis) of an activation times as many of a gradient, in float32 or wider."""

_CHUNK = 2**18
"""Elements that are multiplied at a time on a processor, whose cache they fit in; elsewhere many times more."""

Remake = Callable[[slice], Tensor]
"""Some rows of an activation, made again."""


def _normed(node: Any, rows: slice) -> Tensor:
    """What a layer norm gave; it keeps what its input was less, and times."""
    normed = (node._saved_input[rows] - node._saved_result1[rows]).mul_(node._saved_result2[rows])
    if node._saved_weight is not None:
        normed.mul_(node._saved_weight)
    return normed if node._saved_bias is None else normed.add_(node._saved_bias)


_REMADE: Mapping[str, Callable[[Any, slice], Tensor]] = {
    "GeluBackward0": lambda node, rows: gelu(node._saved_self[rows], approximate=node._saved_approximate),
    "SiluBackward0": lambda node, rows: silu(node._saved_self[rows]),
    "NativeLayerNormBackward0": _normed,
    "MulBackward0": lambda node, rows: node._saved_self[rows] * node._saved_other[rows],
}
"""By the operation that gave an activation, how to make it again of what that keeps for its own gradient."""


def product_of(activation: Tensor, bias: Tensor | None = None) -> Product:
    """An activation (less a bias ``[D]``) times a gradient, until its graph is freed.

    The activation itself is kept only where it cannot be made again.
    """
    wide = torch.promote_types(activation.dtype, torch.float32)
    remake = remake_of(activation) if bias is None else None
    if remake is not None:
        return lambda rows, gradient: remake(rows).to(wide).mul_(gradient)
    kept = activation.detach()
    if bias is None:
        return lambda rows, gradient: kept[rows].to(wide) * gradient
    return lambda rows, gradient: (kept[rows].to(wide) - bias).mul_(gradient)


def remake_of(activation: Tensor) -> Remake | None:
    """How to make an activation again, until its graph is freed; None if it cannot be."""
    node = activation.grad_fn
    remake = _REMADE.get(node.name()) if node is not None else None
    if remake is None or not _keeps_alike(node, activation):
        return None
    return lambda rows: remake(node, rows)


def _keeps_alike(node: Any, activation: Tensor) -> bool:
    """Whether what an operation keeps has the activation's rows; a factor that is a number has not."""
    kept = [
        getattr(node, name) for name in ("_saved_self", "_saved_other", "_saved_input") if hasattr(node, name)
    ]
    return all(value is not None and value.shape == activation.shape for value in kept)


def sums_over_tokens(product: Product, gradient: Tensor, samples: int) -> Tensor:
    r"""Per sample, :math:`\sum_t x_t g_t` over its tokens.

    Args:
        product: Of x and g.
        gradient: g, ``[B ..., D]``: every sample as many rows along the first axis as the others.
        samples: B.

    Returns:
        ``[B, D]``, in float32 or wider.
    """
    each, width = len(gradient) // samples, gradient.shape[-1]
    chunk = _CHUNK if gradient.device.type == "cpu" else _CHUNK * 2**6
    step = max(1, chunk * samples // max(1, gradient.numel()))
    sums = []
    for first in range(0, samples, step):
        count = min(step, samples - first)
        rows = slice(first * each, (first + count) * each)
        sums.append(product(rows, gradient[rows]).reshape(count, -1, width).sum(1))
    return torch.cat(sums)
