"""Merging by the Fisher information of every parameter, whether it is kept whole or by rows and columns.

Nothing here loads mergekit: its registry asks for one method while another is being imported.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fisher_mask_mergekit.blocks import Index, in_blocks, wide_dtype
from fisher_mask_mergekit.diagonal_sidecar import DiagonalSidecar
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar
from fisher_mask_mergekit.factors import Factors
from fisher_mask_mergekit.merging import (
    Missing,
    ParameterKind,
    compare_measurements,
    counted_inputs,
    find_sidecar,
    identified,
    prior_of,
)
from fisher_mask_mergekit.parameter_records import AnyRecord
from fisher_mask_mergekit.weighting import Prior, check_parent, check_prior, merge_rows, relative

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup

NormalizeParameters = Literal["none", "model", "tensor"]
"""What a model's Fisher information is divided by: nothing, its mean over all parameters, or over the parameter."""

_Sidecar = DiagonalSidecar | FactoredSidecar
Fisher = Callable[[int, Index], Tensor]
"""Gives a block of a model's Fisher information, by the model's number; it is not changed."""


_MOST_TOTAL = 1e32
"""Of a prior and Fisher information over its mean, which is no larger than the number of elements: what is multiplied by
it stays in float32's range."""


def merge_parameters(
    group: "TensorGroup",
    name: str,
    weight: Mapping[Hashable, float | None],
    sidecar: Mapping[Hashable, str],
    normalize: NormalizeParameters,
    prior: float,
    clip: bool,
    missing: Missing,
    kind: ParameterKind,
) -> Tensor:
    """Merge the inputs of one output tensor, each element by its own Fisher information.

    Args:
        group: The inputs.
        name: The output tensor's.
        weight: As recipes have it.
        sidecar: Likewise.
        normalize: What a model's Fisher information is divided by.
        prior: The parent's precision; 0 for none.
        clip: Whether to keep to what the parent and the models have, see :class:`~fisher_mask_mergekit.weighting.Prior`.
        missing: What to do if a model has no sidecar.
        kind: Of sidecars.

    Raises:
        FisherMaskError: If a sidecar is missing, cannot be used, or is another checkpoint's; or if the weights
            cannot be used.
    """
    inputs = counted_inputs(group, weight)
    check_prior(prior, normalize)
    if isinstance(inputs, Tensor):
        return inputs
    if prior and group.base is not None:
        check_parent(prior, group.base.id, weight[group.base.id])
    found = [find_sidecar(entry.id, sidecar[entry.id], kind, missing) for entry, _ in inputs]
    tensors, weights = [entry.tensor for entry, _ in inputs], [given for _, given in inputs]
    sidecars = [known for known in found if known is not None]
    compare_measurements(sidecars)
    records = [
        identified(known, name, entry, kind)
        for (entry, _), known in zip(inputs, found, strict=True)
        if known is not None
    ]
    parameters = [record for record in records if record is not None]
    if sidecars and not parameters:
        return merge_rows(tensors, weights)
    start = prior_of(group, weight, prior, clip)
    if len(sidecars) < len(inputs):
        return merge_rows(tensors, weights, prior=start)
    if len(parameters) < len(records):
        raise SidecarMismatchError("it is a parameter of one model, and none of another")
    scales = [_scale(known, one, normalize) for known, one in zip(sidecars, parameters, strict=True)]
    given = relative(weights).tolist()  # Only their ratios count, and nothing that they divide overflows.
    coefficients = [one / (scale or 1.0) for one, scale in zip(given, scales, strict=True)]
    for known, scale, coefficient in zip(sidecars, scales, coefficients, strict=True):
        # Without a prior only ratios count.
        if not coefficient < (math.inf if start is None else torch.finfo(torch.float32).max):
            of = "all parameters" if normalize == "model" else "this tensor"
            raise SidecarError(f"{known.source}: a mean over {of} of {scale} divides nothing")
    blocks = _blocks_of(sidecars, parameters, coefficients, tensors[0], is_relative=start is None)
    if start is None:
        return merge_elements(tensors, given, *blocks)
    return step_elements(tensors, given, *blocks, start, [known.source for known in sidecars])


def _scale(sidecar: _Sidecar, record: AnyRecord, normalize: NormalizeParameters) -> float:
    if normalize == "tensor":
        return sidecar.mean_of(record)
    return sidecar.metadata.mean if normalize == "model" else 1.0


def _blocks_of(
    sidecars: Sequence[_Sidecar],
    records: Sequence[AnyRecord],
    coefficients: Sequence[float],
    like: Tensor,
    *,
    is_relative: bool,
) -> tuple[Sequence[float], Fisher]:
    """What :func:`merge_elements` multiplies Fisher information by, and where it gets that from.

    Args:
        sidecars: Of every model.
        records: The tensor in each.
        coefficients: What the models' Fisher information is to be multiplied by.
        like: One of the tensors that are merged.
        is_relative: Whether only ratios of the products count.
    """
    products = [
        sidecar.factors(record)
        for sidecar, record in zip(sidecars, records, strict=True)
        if isinstance(sidecar, FactoredSidecar)
    ]
    if products:
        scaled = _scaled(products, coefficients, like, is_relative=is_relative)
        return [1.0] * len(products), lambda number, index: scaled[number].block(index)
    diagonal = [sidecar for sidecar in sidecars if isinstance(sidecar, DiagonalSidecar)]
    return coefficients, lambda number, index: diagonal[number].fisher(records[number], index)


def _scaled(
    products: Sequence[Factors], coefficients: Sequence[float], like: Tensor, *, is_relative: bool
) -> list[Factors]:
    """Factors times what weighs their model; where only ratios count, over the largest of all: so that what is multiplied
    neither over- nor underflows.
    """
    most = max(coefficients) if is_relative else 1.0
    tops = [
        (float(one.rows.max()), float(one.columns.max()), coefficient / most)
        for one, coefficient in zip(products, coefficients, strict=True)
    ]
    largest = (max(math.prod(top) for top in tops) if is_relative else 0.0) or 1.0

    def to(factor: Tensor, scale: float) -> Tensor:
        return (factor * scale).to(like.device, wide_dtype(like))

    return [
        Factors(to(one.rows, coefficient * columns / largest), to(one.columns, 1 / (columns or 1.0)))
        for one, (_, columns, coefficient) in zip(products, tops, strict=True)
    ]


def merge_elements(
    tensors: Sequence[Tensor], weights: Sequence[float], factors: Sequence[float], fisher: Fisher
) -> Tensor:
    r"""Fisher-weighted mean of tensors, element by element.

    .. math:: \theta^* = \frac{\sum_j c_j F_j \theta_j}{\sum_j c_j F_j}

    as a running mean: with :math:`S_j = c_1 F_1 + \dots + c_j F_j`, :math:`\theta^* \leftarrow \theta^* +
    (\theta_j - \theta^*) \, c_j F_j / S_j`, so that models that agree are left as they are, to the last digit.
    Elements where every F is zero take the mean weighted by :math:`\lambda`. There is no floor.

    Args:
        tensors: :math:`\theta_j`, all of one shape and dtype. Not changed.
        weights: :math:`\lambda_j > 0`.
        factors: :math:`c_j > 0`, :math:`\lambda_j` over what normalises F.
        fisher: Gives a block of :math:`F_j`, non-negative; asked once for each block and model, in order.

    Returns:
        :math:`\theta^*`, of the inputs' dtype; computed in float32, or float64 if that is the inputs'.

    Reference: arXiv 2111.09832.
    """
    largest = max(factors)  # So that no product overflows.

    def add(index: Index, values: Sequence[Tensor], merged: Tensor) -> None:
        def weighted(number: int) -> Tensor:
            part = fisher(number, index).to(merged.device, merged.dtype)
            return part if factors[number] == largest else part * (factors[number] / largest)

        total = weighted(0)
        merged.copy_(values[0])
        for number, value in enumerate(values[1:], 1):
            part = weighted(number)
            total = total + part
            share = part / total
            if _reaches_zero(total):
                share.nan_to_num_(nan=0.0)  # 0 / 0, where it was zero in all so far.
            merged.lerp_(value.to(merged.dtype), share)
        if _reaches_zero(total):
            merged.copy_(torch.where(total == 0, merge_rows(values, weights).to(merged.dtype), merged))

    return in_blocks(tensors, add)


def step_elements(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    factors: Sequence[float],
    fisher: Fisher,
    prior: Prior,
    sources: Sequence[str],
) -> Tensor:
    r"""From the models' parent, the sum of their weighted changes, element by element.

    .. math:: \theta^* = \theta_0 + \frac{\sum_j (\lambda_j \kappa + c_j F_j) (\theta_j - \theta_0)}
        {\kappa + \sum_j c_j F_j}

    Args:
        tensors: :math:`\theta_j`, all of one shape and dtype. Not changed.
        weights: :math:`\lambda_j > 0`, of mean 1.
        factors: :math:`c_j`, :math:`\lambda_j` over the mean of :math:`F_j`.
        fisher: As :func:`merge_elements` takes it.
        prior: :math:`\theta_0` and :math:`\kappa`, and whether to clip.
        sources: Where each F is from, for messages.

    Returns:
        :math:`\theta^*`, of the inputs' dtype; computed in float32, or float64 if that is the inputs'.

    Raises:
        SidecarError: If an F is larger than what it was divided by allows (names whose).

    Reference: see :func:`~fisher_mask_mergekit.weighting.steps`.
    """

    def add(index: Index, values: Sequence[Tensor], merged: Tensor) -> None:
        def scaled(number: int) -> Tensor:
            return fisher(number, index).to(merged.device, merged.dtype) * factors[number]

        *models, parent = values
        parent, total = parent.to(merged.dtype), torch.full_like(merged, prior.precision)
        for number, (value, given) in enumerate(zip(models, weights, strict=True)):
            part = scaled(number)
            total += part
            merged.addcmul_(value - parent, part + given * prior.precision)
        if total.numel() and not float(total.amax()) < _MOST_TOTAL:
            tops = [
                float(scaled(number).nan_to_num(math.inf, math.inf).amax()) for number in range(len(models))
            ]
            raise SidecarError(
                f"{sources[tops.index(max(tops))]}: Fisher information of {max(tops):.4g} times its mean is more than "
                "can be: the stored mean is not that of the numbers. Measure the checkpoint again"
            )
        merged.div_(total).add_(parent)
        prior.confine(merged, values)

    return in_blocks([*tensors, prior.parent], add)


def _reaches_zero(total: Tensor) -> bool:
    return total.numel() > 0 and not float(total.amin()) > 0
