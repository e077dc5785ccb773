"""Experts that share their weights, run so that it is seen which expert's activation is which token's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.activations import Product


@dataclass(frozen=True)
class Routing:
    """Which rows of the experts' activations ``[S, ...]`` are whose, ordered by expert.

    Attributes:
        experts: ``[S]``.
        tokens: ``[S]``, places along the first axis of what the experts are given.
    """

    experts: Tensor
    tokens: Tensor


Watch = Callable[[Tensor, Routing, Tensor], Tensor]
"""What looks at activations ``[S, ...]`` and at the tokens ``[T, ...]`` they are of, and gives what is to go on in their place."""


def can_run(experts: nn.Module) -> bool:
    """Whether :func:`run_experts` is one of their implementations.

    It is of those whose implementation transformers lets one choose, and of Llama 4's.
    """
    return (hasattr(experts, "has_gate") and hasattr(experts, "_apply_gate")) or _take_all(experts)


def _take_all(experts: nn.Module) -> bool:
    return type(experts).__name__ == "Llama4TextExperts"


def _nothing(activations: Tensor, routing: Routing, tokens: Tensor) -> Tensor:
    return activations


def run_experts(
    experts: Any,
    hidden: Tensor,
    *routed: Tensor,
    before: Watch = _nothing,
    after: Watch = _nothing,
) -> Tensor:
    """The forward pass of experts, each on all of its tokens, in the order of the tokens.

    Args:
        experts: As :func:`can_run` takes them.
        hidden: ``[tokens, model]``; for Llama 4's every expert's own, ``[E * tokens, model]``.
        routed: The experts of every token ``[tokens, k]`` and their weights, likewise; nothing for Llama 4's.
        before: Sees what the first projection gives, without its bias: ``[S, 2 D]``, or ``[S, D]`` without a gate.
        after: Sees the neurons' activations ``[S, D]``.

    Returns:
        As ``hidden`` is.
    """
    if _take_all(experts):
        return _run_all(experts, hidden, before, after)
    chosen, weights = routed
    of_rows, order = chosen.flatten().sort(stable=True)
    routing = Routing(of_rows, order // chosen.shape[1])
    counts = torch.bincount(of_rows, minlength=experts.num_experts).tolist()
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = before(_projected(experts, first, hidden[routing.tokens], counts), routing, hidden)
    inner = _biased(experts, first, inner, routing)
    inner = after(experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner), routing, hidden)
    output = _biased(experts, "down_proj", _projected(experts, "down_proj", inner, counts), routing)
    if getattr(experts, "has_post_expert_norm", False):  # Older transformers have none such.
        output = experts.post_expert_norm(output)
    weighted = (output * weights.flatten()[order, None])[order.argsort()]
    return weighted.unflatten(0, chosen.shape).sum(1).to(hidden.dtype)


def _run_all(experts: Any, hidden: Tensor, before: Watch, after: Watch) -> Tensor:
    """Every expert on every token, which is 0 to those that were not chosen."""
    each = hidden.unflatten(0, (experts.num_experts, -1))
    count, tokens = each.shape[:2]
    of_rows = torch.arange(count, device=hidden.device).repeat_interleave(tokens)
    routing = Routing(of_rows, torch.arange(tokens, device=hidden.device).repeat(count))
    by_token = each.transpose(0, 1)
    inner = before(torch.bmm(each, experts.gate_up_proj).flatten(0, 1), routing, by_token)
    gate, up = inner.chunk(2, -1)
    inner = after(up * experts.act_fn(gate), routing, by_token)
    return torch.bmm(inner.unflatten(0, (count, tokens)), experts.down_proj).flatten(0, 1)


def _projected(experts: Any, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    weight = getattr(experts, name) if experts.is_transposed else getattr(experts, name).transpose(1, 2)
    parts = zip(rows.split(counts), weight, strict=True)
    return torch.cat([part @ matrix for part, matrix in parts if len(part)])


def _biased(experts: Any, name: str, rows: Tensor, routing: Routing) -> Tensor:
    return rows + getattr(experts, f"{name}_bias")[routing.experts] if experts.has_bias else rows


def sums_over_routed(
    product: Product, gradient: Tensor, routing: Routing, shape: tuple[int, int, int]
) -> Tensor:
    r"""Per sample and expert, :math:`\sum_t x_t g_t` over the sample's tokens that the expert got.

    Args:
        product: Of x and g.
        gradient: g, ``[S, D]``.
        routing: Of their rows.
        shape: Samples B, experts E, and how many tokens each sample has.

    Returns:
        ``[B, E, D]``, in float32 or wider.
    """
    samples, experts, tokens = shape
    place = (routing.tokens // tokens) * experts + routing.experts
    products = product(slice(None), gradient)
    sums = products.new_zeros(samples * experts, gradient.shape[-1]).index_add_(0, place, products)
    return sums.unflatten(0, (samples, experts))
