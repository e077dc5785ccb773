"""Fisher information of mask nodes, from batched forward and backward passes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.mask_gradients import MaskGradients
from fisher_mask_mergekit.passes import Agree, frozen, no_sample, run_samples
from fisher_mask_mergekit.settings import Estimator, Labels, MaskPlacement
from fisher_mask_mergekit.sites import NodeKey, Site, stack_of
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch, Task


@dataclass(frozen=True)
class MaskFisher:
    """What :func:`mask_fisher` measured.

    Attributes:
        fisher: Per site and kind of node, a vector (``head_fisher [H]``, ``kv_head_fisher [K]``,
            ``neuron_fisher [D]``, or ``[E, D]`` for E experts), non-negative, in nats squared; float64, or
            float32 where the device has no float64.
        samples: N.
        loss: Mean over samples of their negative log-likelihood, in nats.
        accuracy: Mean over samples of the share of predictions whose most probable outcome is the data's.
        one_by_one: Whether samples ran one at a time, because not every site keeps them apart in a batch.
        unreached: Sites that no sample ran through (an expert's, a vision tower's without images), or whose stack no loss
            sees: all zeros.
    """

    fisher: dict[NodeKey, Tensor]
    samples: int
    loss: float
    accuracy: float
    one_by_one: bool
    unreached: tuple[str, ...]


def mask_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Iterable[Site],
    task: Task,
    *,
    labels: Labels = "data",
    estimator: Estimator = "sample",
    mask_placement: MaskPlacement = "post",
    seed: int = 0,
    recompute: bool = False,
    tally: Tally[NodeKey] | None = None,
    on_batch: Callable[[Batch, Tally[NodeKey]], None] = lambda batch, tally: None,
    settle: Settle[NodeKey] = lambda tally: tally,
    agree: Agree | None = None,
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

    Experts that are kept as one parameter ``W [E, ...]`` have no module of their own; their forward pass is
    run here instead, so that every activation's token, and thereby its sample, is known. Where that cannot be,
    the mask's gradient is the sum of :math:`W \, \partial \ell_n / \partial W` over what leaves the neuron, and
    all samples run one at a time. So they do where samples do not lie one after the other along the first
    axis of a site's input.

    Args:
        model: A model with the task's head.
        batches: The samples. An iterator is enough; it is read once.
        sites: Where the model's mask nodes are.
        task: What the loss is.
        labels: ``data``: :math:`y_n` from the batch (empirical Fisher). ``sampled``: :math:`y_n` drawn from
            :math:`p(y \mid x_n)`, by ``seed`` and the sample's index. ``exact``: the expectation of the
            squared gradient over :math:`p(y \mid x_n)`, one backward pass per label.
        estimator: ``sample``: the formula above. ``batch``: the released code's,
            :math:`\sum_b ( \frac{1}{|b|} \sum_{n \in b} \partial \ell_n / \partial m_i )^2`.
        mask_placement: ``post``: the neuron mask multiplies the input of the FFN's output projection.
            ``pre`` (eq. 2): it multiplies W x, before the bias is added and the activation applied; in a
            gated FFN, the W x that the activation is applied to.
        seed: For ``sampled``.
        recompute: Run every layer again in the backward pass instead of keeping its activations: less
            memory, about 1.5 times the time.
        tally: What was summed over samples before, to go on from; added to in place.
        on_batch: Called after every batch, with what was summed up to there.
        settle: Called after the last batch; what it returns is made means of.
        agree: As :func:`~fisher_mask_mergekit.passes.run_samples` takes it.

    Returns:
        The Fisher information and what else was seen of the samples.

    Raises:
        MeasurementError: If there is no sample; a loss or a gradient is not finite (names the site and
            the node); a sample gives something else by itself than in its batch; no gradient reaches
            any site, or one that did run and has others of its stack that are reached; or if the batch
            estimator is to take all labels.

    Reference: arXiv 2403.09891, eq. (4), with masks as in eq. (2).
    """
    if (labels, estimator) == ("exact", "batch"):
        raise MeasurementError(
            "estimator 'batch' squares one gradient per batch; it takes labels data or sampled"
        )
    sites = tuple(sites)
    gradients = MaskGradients(model, sites, mask_placement, estimator, recompute, tally or Tally())
    if agree is not None and gradients.tally.one_by_one:
        raise MeasurementError(
            "the nodes of its experts show in the gradients of their weights alone, which no process has whole; "
            "take --spread layers"
        )
    gradients.tally.check_shapes(
        {(site.output, node): shape for site in sites for node, shape in site.nodes().items()}
    )
    with frozen(model), gradients.attached():
        run_samples(gradients, batches, task, labels=labels, seed=seed, on_batch=on_batch, agree=agree)
    return _means(settle(gradients.tally), sites, estimator, gradients.ran)


def _means(
    tally: Tally[NodeKey], sites: tuple[Site, ...], estimator: Estimator, ran: Collection[str]
) -> MaskFisher:
    if tally.samples == 0:
        raise no_sample()
    sums, samples = tally.sums, tally.samples
    for key, total in sums.items():  # In backward order: the first that is bad is where it began.
        _check_finite(total, key)
    unreached = _unreached(sites, sums, ran)
    scale = 1 if estimator == "batch" else samples
    like = next(iter(sums.values()))
    fisher = {}
    for site in sites:
        for node, shape in site.nodes().items():
            key = site.output, node
            fisher[key] = sums[key] / scale if key in sums else like.new_zeros(shape)
    return MaskFisher(
        fisher, samples, tally.loss / samples, tally.correct / samples, tally.one_by_one, unreached
    )


def _unreached(
    sites: tuple[Site, ...], reached: Mapping[NodeKey, Tensor], ran: Collection[str]
) -> tuple[str, ...]:
    """The sites that no sample ran through, and those of stacks that no loss sees anything of.

    Raises:
        MeasurementError: If one, or the module around it, was run, and no gradient of it arrived though others of its
            stack did; or none at all arrived.
    """
    there = {output for output, _ in reached}
    stacks = {stack_of(output) for output in there}
    unreached = tuple(site.output for site in sites if site.output not in there)
    strange = [output for output in unreached if (output in ran and stack_of(output) in stacks) or not there]
    if strange:
        raise MeasurementError(
            f"no gradient reached {strange[0]}: the model does not run it, or does not use what it gives"
        )
    return unreached


def _check_finite(total: Tensor, key: NodeKey) -> None:
    bad = ~total.isfinite()
    if bool(bad.any()):
        site, kind = key
        node = bad.nonzero()[0].tolist()
        raise MeasurementError(
            f"the gradient at {site}, {kind.removesuffix('_fisher').replace('_', ' ')} "
            f"{' of expert '.join(map(str, reversed(node)))}, is not finite "
            f"({total[tuple(node)].item()}); try another dtype, or look for infinities in the checkpoint"
        )
