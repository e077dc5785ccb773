"""The merge method ``fisher_diagonal``."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from fisher_mask_mergekit.autoload import install
from fisher_mask_mergekit.blocks import Index, in_blocks
from fisher_mask_mergekit.diagonal_sidecar import INDEX, AnyRecord, DiagonalSidecar, read_diagonal
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.merging import (
    Missing,
    compare_measurements,
    compute_command,
    counted_inputs,
    find_sidecar,
    merge_errors,
)
from fisher_mask_mergekit.weighting import merge_rows

NormalizeModel = Literal["none", "model"]


class FisherDiagonalMerge(GroupMergeMethod):
    """Every parameter by its own Fisher information.

    Parameters in the recipe, per model:

    - ``weight``: lambda, as in ``fisher_mask``.
    - ``sidecar``: folder of the model's sidecar, if it is neither beside the checkpoint nor in the cache.

    Parameters for the merge:

    - ``normalize``: ``none``; or ``model``, which divides a model's Fisher information by its own mean over all
      parameters.
    - ``missing``: ``error`` or ``average``, if a model has no sidecar.
    """

    spec = MergeMethodSpec(
        name="fisher_diagonal",
        pretty_name="Diagonal Fisher",
        reference_url="https://arxiv.org/abs/2111.09832",
        contract=InputContract(base=BasePolicy.IGNORED, min_inputs=1),
        parameters=(
            ParameterSpec("weight", float | None, ParameterScope.INPUT, default=None),
            ParameterSpec("sidecar", str, ParameterScope.INPUT, default=""),
            ParameterSpec("normalize", NormalizeModel, ParameterScope.SHARED, default="none"),
            ParameterSpec("missing", Missing, ParameterScope.SHARED, default="error"),
        ),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge the inputs of one output tensor.

        Args:
            group: The inputs.
            **parameters: As in :attr:`spec`, bound by mergekit.

        Raises:
            MergeError: If a sidecar is missing, cannot be used, or is another checkpoint's; or if the
                weights cannot be used.
        """
        with merge_errors(group) as name:
            return _merge(group, name, **parameters)


def _merge(
    group: TensorGroup,
    name: str,
    weight: Mapping[Hashable, float | None],
    sidecar: Mapping[Hashable, str],
    normalize: NormalizeModel,
    missing: Missing,
) -> Tensor:
    inputs = counted_inputs(group, weight)
    if isinstance(inputs, Tensor):
        return inputs
    found = [
        find_sidecar(entry.id, sidecar[entry.id], "diagonal", missing, _read_once) for entry, _ in inputs
    ]
    tensors, weights = [entry.tensor for entry, _ in inputs], [given for _, given in inputs]
    sidecars = [known for known in found if known is not None]
    compare_measurements(sidecars)
    records = [
        _identify(known, name, entry)
        for (entry, _), known in zip(inputs, found, strict=True)
        if known is not None
    ]
    parameters = [record for record in records if record is not None]
    if len(sidecars) < len(inputs) or not parameters:
        return merge_rows(tensors, weights)
    if len(parameters) < len(records):
        raise SidecarMismatchError("it is a parameter of one model, and none of another")
    scales = [known.metadata.mean if normalize == "model" else 1.0 for known in sidecars]
    factors = [given / (scale or 1.0) for given, scale in zip(weights, scales, strict=True)]
    for known, factor in zip(sidecars, factors, strict=True):
        if not math.isfinite(factor):
            raise SidecarError(
                f"{known.source}: a mean over all parameters of {known.metadata.mean} divides nothing"
            )

    def fisher(number: int, index: Index) -> Tensor:
        return sidecars[number].fisher(parameters[number], index)

    return merge_elements(tensors, weights, factors, fisher)


def merge_elements(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    factors: Sequence[float],
    fisher: Callable[[int, Index], Tensor],
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
        total = torch.zeros_like(merged)
        for number, (value, factor) in enumerate(zip(values, factors, strict=True)):
            part = fisher(number, index).to(merged.device, merged.dtype, copy=True).mul_(factor / largest)
            total += part
            part.div_(total).nan_to_num_(nan=0.0)  # 0 / 0, where it was zero in all so far.
            merged.addcmul_(value - merged, part)
        unknown = total == 0
        if bool(unknown.any()):
            merged.copy_(torch.where(unknown, merge_rows(values, weights).to(merged.dtype), merged))

    return in_blocks(tensors, add)


def _identify(sidecar: DiagonalSidecar, name: str, entry: TensorEntry) -> AnyRecord | None:
    try:
        return sidecar.identify(name, entry.tensor)
    except SidecarMismatchError as error:
        raise SidecarMismatchError(
            f"{entry.id}: {error}\n  Measure this checkpoint:  {compute_command(entry.id, 'diagonal')}"
        ) from error


def _read_once(path: Path, modified: int, size: int) -> DiagonalSidecar:
    index = path / INDEX
    try:
        state = index.stat()  # A folder does not change when a file in it does.
    except OSError as error:
        raise SidecarError(f"cannot read sidecar {index}: {error.strerror or error}") from error
    return _read_index_once(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _read_index_once(path: Path, modified: int, size: int) -> DiagonalSidecar:
    return read_diagonal(path)


fisher_diagonal = FisherDiagonalMerge()
install()  # Imported before mergekit was, this module was not complete when the hook ran.
