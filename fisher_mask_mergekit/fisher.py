"""Fisher information of mask nodes, from batched forward and backward passes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.settings import Estimator, Labels, MaskPlacement
from fisher_mask_mergekit.sites import Node, Site, sum_over_groups
from fisher_mask_mergekit.tasks import log_probabilities

NodeKey = tuple[str, Node]
"""A site's output projection and the kind of node."""


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        inputs: What the model takes, each ``[B, ...]``.
        labels: ``[B]``, indices of the checkpoint's labels.
        index: Which of the drawn samples these are; seeds the draw of labels from the model.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: tuple[int, ...]


@dataclass(frozen=True)
class MaskFisher:
    """What :func:`mask_fisher` measured.

    Attributes:
        fisher: Per site and kind of node, a vector (``head_fisher [H]``, ``kv_head_fisher [K]``,
            ``neuron_fisher [D]``), non-negative, in nats squared; float64, or float32 where the device
            has no float64.
        samples: N.
        loss: Mean over samples of the negative log-likelihood of the data's labels, in nats.
        accuracy: Share of samples whose most probable label is the data's.
    """

    fisher: dict[NodeKey, Tensor]
    samples: int
    loss: float
    accuracy: float


def mask_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Iterable[Site],
    *,
    labels: Labels = "data",
    estimator: Estimator = "sample",
    mask_placement: MaskPlacement = "post",
    seed: int = 0,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> MaskFisher:
    r"""Diagonal Fisher information of the mask nodes.

    .. math:: I_{ii} = \frac{1}{N} \sum_{n=1}^{N} \left( \partial \ell_n / \partial m_i \right)^2 \Big|_{m=1}

    with :math:`\ell_n = -\log p(y_n \mid x_n)` in nats and :math:`m_i` a multiplier, constant 1, on an
    attention head's output or on a neuron of the FFN's intermediate layer. The mean runs over samples,
    never over batches. A key-value head's mask multiplies the outputs of all query heads that share it.

    No mask exists. At m = 1, with x the tensor the mask would multiply, :math:`\partial \ell_n / \partial
    m_i` is the sum of :math:`x \, \partial \ell_n / \partial x` over the sample's tokens and the node's
    dimensions, and one backward pass of the summed loss gives it for every sample of the batch. That
    needs samples that do not influence each other: no batch statistics, no dropout. The model is put in
    evaluation mode with frozen weights, and left as it was found.

    Args:
        model: A sequence classifier.
        batches: The samples. An iterator is enough; it is read once.
        sites: Where the model's mask nodes are.
        labels: ``data``: :math:`y_n` from the batch (empirical Fisher). ``sampled``: :math:`y_n` drawn from
            :math:`p(y \mid x_n)`, by ``seed`` and the sample's index. ``exact``: the expectation of the
            squared gradient over :math:`p(y \mid x_n)`, one backward pass per label.
        estimator: ``sample``: the formula above. ``batch``: the released code's,
            :math:`\sum_b ( \frac{1}{|b|} \sum_{n \in b} \partial \ell_n / \partial m_i )^2`.
        mask_placement: ``post``: the neuron mask multiplies the input of the FFN's output projection.
            ``pre`` (eq. 2): it multiplies W x, before the bias is added and the activation applied; in a
            gated FFN, the W x that the activation is applied to.
        seed: For ``sampled``.
        on_batch: Called after every batch.

    Returns:
        The Fisher information and what else was seen of the samples.

    Raises:
        MeasurementError: If there is no sample; a loss or a gradient is not finite (names the site and
            the node); the first sample gives something else by itself than in its batch; or a site's
            input is not batch first.

    Reference: arXiv 2403.09891, eq. (4), with masks as in eq. (2).
    """
    sites = tuple(sites)
    sums: dict[NodeKey, Tensor] = {}
    samples, loss, correct = 0, 0.0, 0
    with _frozen(model), _mask_gradients(model, sites, mask_placement) as gradients:
        for batch in batches:
            log_probs = log_probabilities(model, batch.inputs)
            if samples == 0:
                _check_by_itself(model, batch, log_probs.detach())
            nll = -log_probs.detach().gather(1, batch.labels[:, None])[:, 0]
            if not bool(nll.isfinite().all()):
                bad = int((~nll.isfinite()).nonzero()[0, 0])
                raise MeasurementError(f"the loss of sample {batch.index[bad]} is {nll[bad].item()}")
            for target, weight in _targets(log_probs.detach(), batch, labels, seed):
                gradients.clear()
                loss_sum = -log_probs.gather(1, target[:, None]).sum()
                loss_sum.backward(retain_graph=labels == "exact")
                for key, gradient in gradients.items():
                    sums[key] = sums.get(key, 0) + _squared(gradient, weight, estimator)
            samples += len(nll)
            loss += float(nll.double().sum())
            correct += int((log_probs.argmax(-1) == batch.labels).sum())
            on_batch(batch)
    if samples == 0:
        raise MeasurementError("there is no sample to measure on")
    for key, total in sums.items():  # In backward order: the first that is bad is where it began.
        _check_finite(total, key)
    unreached = [site.output for site in sites for node in site.nodes() if (site.output, node) not in sums]
    if unreached:
        raise MeasurementError(
            f"no gradient reached {unreached[0]}: the model does not run it, or does not use what it gives"
        )
    scale = 1 if estimator == "batch" else samples
    fisher = {(site.output, node): sums[site.output, node] / scale for site in sites for node in site.nodes()}
    return MaskFisher(fisher, samples, loss / samples, correct / samples)


def _check_finite(total: Tensor, key: NodeKey) -> None:
    bad = ~total.isfinite()
    if bool(bad.any()):
        site, kind = key
        node = int(bad.nonzero()[0, 0])
        raise MeasurementError(
            f"the gradient at {site}, {kind.removesuffix('_fisher').replace('_', ' ')} {node}, is not finite "
            f"({total[node].item()}); try another dtype, or look for infinities in the checkpoint"
        )


def _squared(gradient: Tensor, weight: Tensor | None, estimator: Estimator) -> Tensor:
    """One batch's contribution to the sum, ``[B, n] -> [n]``."""
    wide = gradient.to(torch.float32 if gradient.device.type == "mps" else torch.float64)
    if estimator == "batch":
        return wide.mean(0).square()
    squares = wide.square()
    return squares.sum(0) if weight is None else (weight[:, None] * squares).sum(0)


def _targets(
    log_probs: Tensor, batch: Batch, labels: Labels, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The labels ``[B]`` to take gradients for, one backward pass each, and their weights ``[B]``."""
    if labels == "data":
        yield batch.labels, None
    elif labels == "sampled":
        # A draw of its own per sample: neither batch size nor order may change it.
        draws = [numpy.random.default_rng([seed, index]).random() for index in batch.index]
        uniform = torch.tensor(draws, dtype=log_probs.dtype, device=log_probs.device)
        drawn = torch.searchsorted(log_probs.exp().cumsum(1), uniform[:, None])[:, 0]
        yield drawn.clamp(max=log_probs.shape[1] - 1), None
    else:
        for label in range(log_probs.shape[1]):
            yield torch.full_like(batch.labels, label), log_probs[:, label].exp()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients; everything as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextmanager
def _mask_gradients(
    model: nn.Module, sites: tuple[Site, ...], mask_placement: MaskPlacement
) -> Iterator[dict[NodeKey, Tensor]]:
    """A dictionary that every backward pass fills with per-sample mask gradients ``[B, n]``.

    A module that runs several times in a forward pass contributes the sum over its runs.
    """
    gradients: dict[NodeKey, Tensor] = {}

    def add(site: Site, values: Tensor, bias: Tensor | None, gradient: Tensor) -> None:
        wide = torch.promote_types(values.dtype, torch.float32)
        masked = values.to(wide) if bias is None else values.to(wide) - bias.to(wide)
        product = masked * gradient.to(wide)
        per_sample = product.flatten(1, -2).sum(1)
        if site.kind == "ffn":
            found: dict[Node, Tensor] = {"neuron_fisher": per_sample}
        else:
            heads = per_sample.unflatten(-1, (site.heads, -1)).sum(-1)
            found = {"head_fisher": heads, "kv_head_fisher": sum_over_groups(heads, site.kv_heads)}
        for node, value in found.items():
            key = (site.output, node)
            gradients[key] = gradients[key] + value if key in gradients else value

    def watch(site: Site, tensor: Tensor, bias: Tensor | None) -> Tensor:
        if tensor.ndim < 3:
            raise MeasurementError(
                f"{site.output}: expected an input [batch, tokens, dim], got {list(tensor.shape)}"
            )
        if not tensor.requires_grad:  # The first site: autograd starts here, not at the embeddings.
            tensor = tensor.detach().requires_grad_()
        # The hook must hold another tensor object than the one it is registered on, else the two keep
        # each other alive.
        tensor.register_hook(partial(add, site, tensor.detach(), bias))
        return tensor

    def before_output(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (watch(site, args[0], None), *args[1:])

    def after_input(site: Site, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return watch(site, output, getattr(module, "bias", None))

    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            if site.kind == "ffn" and mask_placement == "pre":
                module = _submodule(model, site.inputs[0])
                handles.append(module.register_forward_hook(partial(after_input, site)))
            else:
                module = _submodule(model, site.output)
                handles.append(module.register_forward_pre_hook(partial(before_output, site)))
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise MeasurementError(f"the checkpoint has {path}, the loaded model does not") from error


@torch.no_grad()
def _check_by_itself(model: nn.Module, batch: Batch, together: Tensor) -> None:
    """Run a batch's first sample alone: it must not matter how often, and beside whom, a sample is run."""
    alone = log_probabilities(model, {name: tensor[:1] for name, tensor in batch.inputs.items()})
    gap = float((alone - together[:1]).abs().max())
    eps = torch.finfo(next(model.parameters()).dtype).eps
    if gap > eps**0.5 * max(1.0, float(together[:1].abs().max())):
        raise MeasurementError(
            f"sample {batch.index[0]} gave log-probabilities up to {gap:.3g} apart in a batch and by itself: "
            "the model has a random layer that evaluation mode does not switch off, or mixes samples"
        )
