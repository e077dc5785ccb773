"""What a merge makes of weights and Fisher information: each model's share of every row, and the weighted mean.

Used by the merge itself and by what foretells it, so that they cannot disagree.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor

from fisher_mask_mergekit.blocks import Index, in_blocks, wide_dtype
from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, SidecarMismatchError
from fisher_mask_mergekit.recipe import ALL, Nodes
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import GovernedTensor, Layout, Node, Site, row_fisher

Normalize = Literal["none", "model", "layer", "tensor"]
Unmasked = Literal["average", "layer", "universal"]
Found = tuple[Site, GovernedTensor] | None
"""What a model's sidecar knows of a tensor; None if no mask node governs it."""

ASKED_FOR: Mapping[Layout, tuple[str, str | bool]] = {
    "v": ("values", True), "columns h": ("values", True), "columns n": ("nodes", "columns"),
}  # fmt: skip
"""What mask nodes govern only in a scheme with this value of this parameter; tensors of other layouts always."""


LEAST_PRIOR, MOST_PRIOR = 1e-30, 1e30
"""Far from either, it or Fisher information does not count beside the other any more."""


@dataclass(frozen=True)
class Scheme:
    """What a merge weighs by Fisher information, and how.

    Attributes:
        nodes: ``paper``: query and key rows, and the rows of the FFN's intermediate layer. ``columns``: also the
            columns of the FFN's output projection.
        values: Whether also value rows and the columns of the attention's output projection.
        normalize: What a model's Fisher information is divided by.
        unmasked: How tensors that no mask node governs are weighted.
        prior: The parent's precision, see :func:`steps`; 0 for none.
        clip: See :class:`Prior`.
    """

    nodes: Nodes = "paper"
    values: bool = False
    normalize: Normalize = "none"
    unmasked: Unmasked = "average"
    prior: float = 0.0
    clip: bool = False

    def __post_init__(self) -> None:
        check_prior(self.prior, self.normalize)
        if self.nodes == ALL:
            raise FisherMaskError(
                "nodes is 'all', which merges by another kind of sidecar; expected paper or columns"
            )

    def of(self, found: Found) -> Found:
        """What a sidecar knows of a tensor, with layout ``mean`` where this scheme leaves its nodes out."""
        if found is None:
            return None
        site, tensor = found
        parameter, value = ASKED_FOR.get(tensor.layout, ("nodes", self.nodes))
        if getattr(self, parameter) == value:
            return found
        return site, tensor.model_copy(update={"layout": "mean"})


@dataclass(frozen=True)
class Prior:
    r"""What all models were fine-tuned from, taken for what is known of them before any Fisher information.

    Attributes:
        precision: :math:`\kappa > 0` of every element, where a model's Fisher information has the mean 1.
        parent: :math:`\theta_0`, of the models' shape and dtype.
        clip: Whether every element stays between the least and the greatest that the parent and the models have.
    """

    precision: float
    parent: Tensor
    clip: bool = False

    def confine(self, merged: Tensor, values: Sequence[Tensor]) -> None:
        """Clip a block, in place, if that is asked for.

        Args:
            merged: A block of the merge.
            values: The same block of all models, and of the parent.
        """
        if self.clip:
            least, greatest = reduce(torch.minimum, values), reduce(torch.maximum, values)
            merged.clamp_(least.to(merged.dtype), greatest.to(merged.dtype))


def check_prior(given: object, normalize: str) -> float:
    """A recipe's prior, if it can be one.

    Raises:
        RecipeError: If it is no number of 0 or more, too large or too small to compute with, or nothing gives it a scale.
    """
    try:
        prior = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        prior = math.nan
    if not 0 <= prior < math.inf:
        raise RecipeError(f"prior is {given}; expected a number of 0 or more")
    if prior and not LEAST_PRIOR <= prior <= MOST_PRIOR:
        raise RecipeError(
            f"prior is {given}; expected 0, or {LEAST_PRIOR:g} to {MOST_PRIOR:g}: its products must stay in float32's range"
        )
    if prior and normalize == "none":
        raise RecipeError(
            f"prior: {prior} counts in means of each model's Fisher information, so it needs "
            "normalize: tensor (or another that is not none)"
        )
    return prior


_OF_A_SLICE = "in a recipe of slices as base_model of the slice, and as one of its sources"


def check_parent(prior: float, base: Hashable | None, weight: float | None) -> None:
    """Refuse a prior without the model that it is about.

    Args:
        prior: The recipe's, not 0.
        base: The base model, if it has a part in the tensor.
        weight: As the recipe gives it for the base model.

    Raises:
        RecipeError: If there is no base model, or it is one of those that are merged.
    """
    if base is None:
        raise RecipeError(
            f"prior: {prior} needs what the models were fine-tuned from, with this tensor: give it as base_model "
            f"({_OF_A_SLICE})"
        )
    if weight:
        raise RecipeError(
            f"base_model {base} has a weight; with prior it is what the models were fine-tuned from, and none of those "
            f"that are merged: leave its weight out, or name their parent ({_OF_A_SLICE})"
        )


def merge_rows(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    fishers: Sequence[Tensor] | None = None,
    prior: Prior | None = None,
) -> Tensor:
    r"""Fisher-weighted mean of tensors, row by row; or, from their parent, the sum of weighted steps.

    .. math:: \theta^* = \frac{\sum_j \lambda_j F_j \theta_j}{\sum_j \lambda_j F_j}, \qquad
        \theta^* = \theta_0 + \sum_j a_j (\theta_j - \theta_0)

    Args:
        tensors: :math:`\theta_j`, each ``[R, ...]``, all of one shape and dtype. Not changed.
        weights: As :func:`shares` takes them.
        fishers: Likewise; of a shape that broadcasts to the tensors', ``[R, 1]`` for the rows of a matrix.
        prior: Where they start from; then :math:`a_j` are as :func:`steps` has them.

    Returns:
        :math:`\theta^*`, of the inputs' dtype; computed in float32, or float64 if that is the inputs'.

    Reference: arXiv 2403.09891, eq. (5).
    """
    first = tensors[0]
    parts = shares(weights, fishers) if prior is None else steps(weights, fishers, prior.precision)
    rows = [row.expand(first.shape) for row in parts.to(first.device, wide_dtype(first))]

    def add(index: Index, values: Sequence[Tensor], total: Tensor) -> None:
        for value, row in zip(values, rows, strict=True):
            total.addcmul_(value, row[index])

    if prior is None:
        return in_blocks(tensors, add)

    def step(index: Index, values: Sequence[Tensor], total: Tensor) -> None:
        *models, parent = values
        total.copy_(parent)
        for value, row in zip(models, rows, strict=True):
            total.addcmul_(value - parent.to(total.dtype), row[index])
        prior.confine(total, values)

    return in_blocks([*tensors, prior.parent], step)


def shares(weights: Sequence[float], fishers: Sequence[Tensor] | None = None) -> Tensor:
    r"""Each model's share of every row.

    .. math:: s_j = \frac{\lambda_j F_j}{\sum_i \lambda_i F_i}

    Rows where every :math:`\lambda_j F_j` is zero, and all rows if no Fisher information is given, are shared
    by :math:`\lambda_j` alone. There is no floor: only the ratios of the F matter.

    Args:
        weights: :math:`\lambda_j \ge 0` of M models, at least one positive.
        fishers: :math:`F_j`, non-negative, of one shape.

    Returns:
        :math:`s_j`, ``[M]`` or, with Fisher information, ``[M, ...]`` of its shape; float64, on the CPU. They sum
        to 1 over the models.
    """
    # mergekit's executor for many GPUs makes the thread's GPU the default for new tensors.
    plain = torch.tensor(weights, dtype=torch.float64, device="cpu")
    plain = plain / plain.max()  # So that no sum overflows.
    if fishers is None:
        return plain / plain.sum()
    plain = plain.reshape(-1, *[1] * fishers[0].ndim)
    weighted = plain * torch.stack([fisher.to("cpu", torch.float64) for fisher in fishers])
    total = weighted.sum(0)
    return torch.where(total > 0, weighted / total, plain / plain.sum())


def steps(weights: Sequence[float], fishers: Sequence[Tensor] | None, precision: float) -> Tensor:
    r"""How much of each model's change from the parent a merge takes, of every row.

    .. math:: a_j = \frac{\lambda_j (\kappa + F_j)}{\kappa + \sum_i \lambda_i F_i}

    It is the mean of the product of what fine-tuning on each task knows of the weights, a normal distribution around
    :math:`\theta_j` with precision :math:`\kappa + F_j`, of which the parent's own, with precision :math:`\kappa`, is
    counted once. One model alone is taken as it is. Where all F are 0, all changes are added up.

    Args:
        weights: As :func:`shares` takes them: only their ratios count, :math:`\lambda` has the mean 1.
        fishers: :math:`F_j` in units of their own mean; 1 if none are given.
        precision: :math:`\kappa > 0`, in the same units.

    Returns:
        :math:`a_j`, ``[M]`` or, with Fisher information, ``[M, ...]`` of its shape; float64, on the CPU.

    Reference: arXiv 2310.12808, with a constant for the parent's own Fisher information.
    """
    plain = relative(weights)
    if fishers is None:
        return plain * (precision + 1) / (precision + len(weights))
    plain = plain.reshape(-1, *[1] * fishers[0].ndim)
    fisher = torch.stack([one.to("cpu", torch.float64) for one in fishers])
    return plain * (precision + fisher) / (precision + (plain * fisher).sum(0))


def relative(weights: Sequence[float]) -> Tensor:
    """Weights over their mean, ``[M]``, float64, on the CPU."""
    plain = torch.tensor(weights, dtype=torch.float64, device="cpu")
    plain = plain / plain.max()  # So that no sum overflows.
    return plain / plain.mean()


def counted_weight(model: Hashable, given: float | None, is_base: bool) -> float:
    r""":math:`\lambda` of a model: as given, else 1, but 0 for the base model.

    Raises:
        FisherMaskError: If what is given is no number of 0 or more.
    """
    if given is None:
        return 0.0 if is_base else 1.0
    if not 0 <= given < float("inf"):
        raise FisherMaskError(f"weight of {model} is {given}; expected a number of 0 or more")
    return given


def fisher_rows(
    sidecars: Sequence[Sidecar | None],
    found: Sequence[Found],
    ndim: int,
    scheme: Scheme,
) -> list[Tensor] | None:
    """What the models' tensors of one name are weighted by.

    Args:
        sidecars: The models', None where a model has none.
        found: What each of them knows of the model's tensor.
        ndim: The tensor's number of dimensions.
        scheme: What is weighed by Fisher information, and how.

    Returns:
        Per model, of one shape that broadcasts to the tensor's; None if it is averaged by weight alone.

    Raises:
        SidecarMismatchError: If the sidecars disagree about which mask nodes govern it.
    """
    found = [scheme.of(known) for known in found]
    rows = [
        None if sidecar is None else _model_rows(sidecar, known, ndim, scheme)
        for sidecar, known in zip(sidecars, found, strict=True)
    ]
    there = [fisher for fisher in rows if fisher is not None]
    if not there or None in sidecars:
        return None
    nodes = {_described(known) for known in found}
    if len(there) < len(rows) or len(nodes) > 1:
        raise SidecarMismatchError(
            f"the models' sidecars disagree about which mask nodes govern this tensor: {' and '.join(sorted(nodes))}"
        )
    return there


def _described(found: Found) -> str:
    """The mask nodes that govern a tensor, and how."""
    if found is None or found[1].layout == "mean":
        return "none"
    site, tensor = found
    counts = (f"{node.removesuffix('_fisher')} {list(shape)}" for node, shape in site.nodes().items())
    one = "" if tensor.expert is None else f" of expert {tensor.expert}"
    return f"{', '.join(counts)}{one} along axis {tensor.axis} in layout '{tensor.layout}'"


def _model_rows(sidecar: Sidecar, found: Found, ndim: int, scheme: Scheme) -> Tensor | None:
    """What one model's tensor is weighted by, broadcast to its shape; None for not at all."""
    if found is not None and found[1].layout != "mean":
        site, tensor = found
        fisher = _normalized(sidecar, site, scheme.normalize)
        rows = row_fisher(site, tensor, fisher, _value_rows(sidecar, site, fisher, scheme))
    elif scheme.unmasked == "average":
        return None
    elif found is not None:
        rows = _site_mean(sidecar, found[0], scheme.normalize).reshape([1] * ndim)
    elif scheme.unmasked == "universal":
        rows = _universal(sidecar, scheme.normalize).reshape([1] * ndim)
    else:
        return None
    if scheme.normalize == "tensor" and (mean := rows.nanmean()) > 0:
        rows = rows / mean
    return torch.where(rows.isnan(), 1.0, rows)


def _value_rows(sidecar: Sidecar, site: Site, fisher: Mapping[Node, Tensor], scheme: Scheme) -> Tensor:
    """Of an attention's value rows, ``[K]`` or ``[1]``; not a number where they are averaged."""
    if scheme.values and site.kind == "attention":
        return fisher["kv_head_fisher"]
    if scheme.unmasked != "average" and site.kind == "attention":
        return _site_mean(sidecar, site, scheme.normalize)
    return torch.full((1,), math.nan, dtype=torch.float64, device="cpu")


def _site_mean(sidecar: Sidecar, site: Site, normalize: Normalize) -> Tensor:
    """Mean Fisher information of a site's heads or neurons, ``[1]``."""
    node: Node = "neuron_fisher" if site.kind == "ffn" else "head_fisher"
    return _normalized(sidecar, site, normalize)[node].mean().reshape(1)


@lru_cache(maxsize=64)
def _universal(sidecar: Sidecar, normalize: Normalize) -> Tensor:
    """Mean over attention sites of their mean plus mean over FFN sites of theirs, ``[1]``."""
    total = torch.zeros(1, dtype=torch.float64, device="cpu")
    for kind in ("attention", "ffn"):
        means = [_site_mean(sidecar, site, normalize) for site in sidecar.metadata.sites if site.kind == kind]
        if means:
            total += torch.cat(means).mean()
    return total


def _normalized(sidecar: Sidecar, site: Site, normalize: Normalize) -> dict[Node, Tensor]:
    """The site's Fisher vectors in float64, divided by the mean over nodes that ``normalize`` names."""
    vectors = {node: vector.double() for node, vector in sidecar.fisher[site.output].items()}
    if normalize in ("none", "tensor"):
        return vectors
    means = (
        sidecar.means
        if normalize == "model"
        else {node: float(vector.mean()) for node, vector in vectors.items()}
    )
    return {node: vector / means[node] if means[node] > 0 else vector for node, vector in vectors.items()}
