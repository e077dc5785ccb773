"""The definition, as a reference: masks that multiply the weights, one sample at a time, gradients by autograd."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fisher_mask_mergekit.sites import NodeKey, Site
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task


class _Masked(nn.Module):
    """A model with some of its weights replaced by others that depend on masks."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.weights = dict(weights)

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, **inputs: Tensor) -> Any:
        return functional_call(self.model, self.weights, (), inputs)


def _masks(site: Site) -> dict[NodeKey, Tensor]:
    return {
        (site.output, node): torch.ones(shape, dtype=torch.float64, requires_grad=True)
        for node, shape in site.nodes().items()
    }


def _masked_weight(
    model: nn.Module, site: Site, masks: Mapping[NodeKey, Tensor], placement: str
) -> tuple[str, Tensor]:
    """The weight whose columns (of the output projection) or rows (before the activation) a mask multiplies."""
    before = placement == "pre" and site.kind == "ffn"
    path = site.inputs[0] if before else site.output
    name = path if site.experts else f"{path}.weight"
    weight = model.get_parameter(name)
    if site.kind == "attention":
        shared = masks[site.output, "kv_head_fisher"].repeat_interleave(site.heads // site.kv_heads)
        mask = (masks[site.output, "head_fisher"] * shared).repeat_interleave(site.head_dim)
    else:
        mask = masks[site.output, "neuron_fisher"]
    mask = mask.to(weight.dtype)
    if before:
        layout = next(tensor.layout for tensor in site.tensors if tensor.name == name)
        ones = torch.ones_like(mask)
        if layout == "n n":
            mask = torch.cat([mask, ones], -1)
        elif layout == "(n n)":
            mask = torch.stack([mask, ones], -1).flatten(-2)
    if site.experts:
        out_in = model.get_parameter(site.output).shape[-1] == site.neurons
        return name, weight * (mask[:, None] if out_in != before else mask[:, :, None])
    in_out = isinstance(model.get_submodule(path), Conv1D)
    return name, weight * (mask[:, None] if in_out != before else mask)


def naive_gradients(
    model: nn.Module,
    task: Task,
    sample: Batch,
    sites: Iterable[Site],
    placement: str = "post",
    outcomes: Tensor | None = None,
) -> tuple[dict[NodeKey, Tensor], Likelihood]:
    """d loss / d mask of one sample, zero where no gradient arrives; and the sample's likelihood."""
    masks: dict[NodeKey, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for site in sites:
        masks |= _masks(site)
        name, weight = _masked_weight(model, site, masks, placement)
        weights[name] = weight
    likelihood = task.likelihood(_Masked(model, weights), sample)
    found = torch.autograd.grad(likelihood.losses(outcomes).sum(), list(masks.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(mask) if gradient is None else gradient
        for (key, mask), gradient in zip(masks.items(), found, strict=True)
    }
    return gradients, likelihood


def naive_fisher(
    model: nn.Module,
    task: Task,
    samples: Iterable[Batch],
    sites: Iterable[Site],
    placement: str = "post",
    labels: str = "data",
) -> dict[NodeKey, Tensor]:
    """Mean over samples of the squared gradients; with ``exact``, of their expectation over outcomes."""
    model.eval()
    sites, samples = tuple(sites), list(samples)
    sums: dict[NodeKey, Any] = {}
    for sample in samples:
        terms: list[Any] = [(None, 1.0)]
        if labels == "exact":
            likelihood = task.likelihood(model, sample)
            terms = list(likelihood.expectation())
        for outcomes, weight in terms:
            gradients, _ = naive_gradients(model, task, sample, sites, placement, outcomes)
            for key, gradient in gradients.items():
                sums[key] = sums.get(key, 0) + weight * gradient**2
    return {key: total / len(samples) for key, total in sums.items()}


def naive_diagonal(
    model: nn.Module, task: Task, samples: Iterable[Batch], labels: str = "data", seed: int = 0
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of every parameter, by autograd; zero where none arrives."""
    model.eval()
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    sums = {name: torch.zeros_like(value.requires_grad_()) for name, value in parameters.items()}
    samples = list(samples)
    for sample in samples:
        likelihood = task.likelihood(model, sample)
        terms: list[Any] = [(None, torch.ones(1))]
        if labels == "exact":
            terms = list(likelihood.expectation())
        elif labels == "sampled":
            terms = [(likelihood.sampled(seed), torch.ones(1))]
        for outcomes, weight in terms:
            loss = likelihood.losses(outcomes).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += weight[0].to(gradient.dtype) * gradient**2
    return {name: total / len(samples) for name, total in sums.items()}
