"""Some or all of a sidecar's samples measured again, and what that says of its numbers.

With all N samples, every number must come out again. With K of them, what they alone add up to is no more than what all
N do, because every sample adds a square: a number below K / N of the K samples' mean is refuted. See
``docs/sidecar.md``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.diagonal import DiagonalFisher
from fisher_mask_mergekit.errors import DataError, MeasurementError, RecipeError
from fisher_mask_mergekit.execution import Execution
from fisher_mask_mergekit.factored import FactoredFisher
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar
from fisher_mask_mergekit.fisher import MaskFisher
from fisher_mask_mergekit.job import Inputs, Job, prepare
from fisher_mask_mergekit.measuring import AnyFisher, Measured, measure
from fisher_mask_mergekit.opening import AnySidecar
from fisher_mask_mergekit.passes import is_out_of_memory
from fisher_mask_mergekit.provenance import data_of
from fisher_mask_mergekit.settings import RANDOM, FisherSettings, WeightDtype
from fisher_mask_mergekit.sidecar import DataRecord, Measurement, Sidecar
from fisher_mask_mergekit.tasks import Batch
from fisher_mask_mergekit.verify import Check, kept_values, same_values

_SHOWN = 3


def rounding(dtype: WeightDtype) -> float:
    """By how much two measurements of the same may differ, as a share of root mean square gradients.

    It is the square root of the dtype's spacing, as for the log-probabilities that the pre-pass compares; and no less
    than the spacing of float32, in which Fisher information is kept.
    """
    return max(torch.finfo(getattr(torch, dtype)).eps ** 0.5, torch.finfo(torch.float32).eps)


def refuted(stored: Tensor, again: Tensor, share: float, slack: float, floor: float = 0.0) -> Tensor:
    r"""Where a stored mean over N samples cannot be that, given the mean over K of them.

    .. math:: \sqrt{I} < \sqrt{K / N} \, (r - t (r + \bar r)), \qquad r = \sqrt{I'}

    with :math:`I'` the mean over the K samples, :math:`\bar r` the root of its mean over the vector, or the floor if that
    is more, and t the slack. With
    K = N also where :math:`\sqrt{I} > r + t (r + \bar r)`. Roots, because rounding that moves the samples' gradients by
    some root mean square moves the root by no more than that (the triangle inequality).

    Args:
        stored: I, of any shape.
        again: I', of the same shape.
        share: K / N.
        slack: t.
        floor: A root mean square gradient of the model's; for vectors of which rounding may be all there is, as of a
            key's bias, which the softmax takes out.

    Returns:
        Boolean, of the same shape.
    """
    kept, root = stored.double().sqrt(), again.double().sqrt()
    margin = slack * (root + again.double().mean().sqrt().clamp(min=floor))
    low = kept < share**0.5 * (root - margin)
    return low | (kept > root + margin) if share == 1 else low


def remeasure(
    sidecar: AnySidecar,
    name: str,
    count: int,
    device: torch.device,
    *,
    data: str | None = None,
    batch_tokens: int | None = None,
    recompute_layers: bool = False,
    trust_remote_code: bool = False,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[Check]:
    """Measure the first of a sidecar's samples again and compare; nothing is written.

    Args:
        sidecar: The sidecar.
        name: The checkpoint: local folder or hub id.
        count: K. The samples were drawn at random, so the first K of them are as good as any.
        device: Where to run.
        data: Where the data is, if not where the sidecar says.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute_layers: Whether layers run again in the backward pass instead of keeping their activations.
        trust_remote_code: Whether to run code that comes with the checkpoint.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: If K is too large for the sidecar, or too small for its estimator; or on bad input.
    """
    metadata = sidecar.metadata
    settings = metadata.settings.model_copy(update={"data": data or data_of(metadata)})
    if count > metadata.samples:
        raise RecipeError(f"--recompute {count}: {sidecar.source} is of {metadata.samples} samples")
    if settings.estimator == "batch" and count < metadata.samples:
        raise RecipeError(
            f"--recompute {count}: {sidecar.source} was measured with estimator batch, which adds up whole batches, so "
            f"single samples prove nothing; take all:  --recompute {metadata.samples}"
        )
    try:
        job = prepare(
            name,
            settings,
            out=Path(sidecar.source),
            force=True,
            trust_remote_code=trust_remote_code,
            writes=False,
        )
    except DataError as error:
        raise DataError(f"{error}; if the data lies elsewhere here, say where:  --data DATASET") from error
    assert job.inputs is not None
    agreement = _data(job, sidecar), _request(job, job.inputs, sidecar)
    yield from agreement
    if any(check.verdict == "failed" for check in agreement):
        yield Check("numbers", "not checked", "nothing was measured: it would not be the same")
        return
    encoded = job.inputs.encoded
    first = dict(list(encoded.samples.items())[:count])
    inputs = replace(job.inputs, encoded=replace(encoded, samples=first))
    with _memory_errors(name, settings):
        found = measure(
            job, inputs, device, Execution(batch_tokens, recompute_layers),
            on_start=on_start, on_batch=lambda batch, tally: on_batch(batch),
        )  # fmt: skip
    yield from _loaded_values(sidecar, found.values)
    yield _numbers(sidecar, found, count)


@contextmanager
def _memory_errors(name: str, settings: FisherSettings) -> Iterator[None]:
    """Where memory lacks, say what helps here: the settings are the sidecar's."""
    try:
        yield
    except MeasurementError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
        tokens = "" if settings.estimator == "batch" else "a smaller --batch-tokens, "
        layers = "--recompute-layers, " if settings.kind == "mask" else ""
        raise MeasurementError(
            f"the device has too little memory for {name}; take {tokens}{layers}or another --device"
        ) from error


def _data(job: Job, sidecar: AnySidecar) -> Check:
    """The rows first: other rows explain everything else."""
    metadata = sidecar.metadata
    here, then = job.data, metadata.data
    if here.digest != then.digest and metadata.settings.data == RANDOM:
        return Check(
            "data", "failed", f"the random tokens are not those that were measured: their content hash is {here.digest:.12}, the "
            f"sidecar has {then.digest:.12}. The checkpoint's tokenizer is another",
        )  # fmt: skip
    if here.digest != then.digest:
        return Check(
            "data", "failed",
            f"the rows drawn from {job.settings.data} are not those that were measured: their content hash is {here.digest:.12}, "
            f"the sidecar has {then.digest:.12} ({here.rows} rows to draw from, {then.rows} then). The data has changed, or is "
            "another: give the one of then with --data",
        )  # fmt: skip
    fields = DataRecord.model_fields.keys() - {"split", "revision", "digest"}
    other = [
        f"{name} {getattr(then, name)!r}, not {getattr(here, name)!r}"
        for name in sorted(fields)
        if getattr(here, name) != getattr(then, name)
    ]
    if other:
        return Check("data", "failed", f"the sidecar says of its data {'; '.join(other)}")
    count = min(metadata.settings.samples, then.rows)
    return Check(
        "data", "ok", f"the {count} rows drawn from {job.settings.data} have the stored content hash"
    )


def _request(job: Job, inputs: Inputs, sidecar: AnySidecar) -> Check:
    """What follows from checkpoint, data and settings without running anything."""
    metadata = sidecar.metadata
    pairs = {
        "task": (metadata.task, job.task.kind),
        "class": (metadata.architecture, job.model_class.__name__),
        "samples": (metadata.samples, len(inputs.encoded.samples)),
        "max_length": (metadata.max_length, inputs.max_length),
        "truncated": (metadata.truncated, inputs.encoded.truncated),
    }
    other = [f"{name} {stored}, not {here}" for name, (stored, here) in pairs.items() if stored != here]
    if isinstance(sidecar, Sidecar):
        if sidecar.metadata.sites != job.sites:
            other.append("other mask nodes than this version finds in the checkpoint")
    elif job.parameters is None or any(
        job.parameters.names.get(record.names[0]) != record.names for record in sidecar.metadata.tensors
    ):
        other.append("other parameters than this version finds in the checkpoint")
    if other:
        return Check("request", "failed", f"the sidecar says {'; '.join(other)}")
    return Check("request", "ok", "task, class, samples and lengths follow from it as stored")


def _loaded_values(sidecar: AnySidecar, values: Mapping[str, Tensor]) -> Iterator[Check]:
    known = kept_values(sidecar)
    wrong = sorted(
        name for name, value in values.items() if name not in known or not same_values(known[name], value)
    )
    if wrong:
        yield Check("values", "failed", f"tensor '{wrong[0]}' has other values than were stored")


def _numbers(sidecar: AnySidecar, found: Measured, count: int) -> Check:
    metadata = sidecar.metadata
    share, slack = count / metadata.samples, rounding(metadata.settings.dtype)
    floor = 0.0 if isinstance(found.fisher, MaskFisher) else _root_mean(found.fisher)
    wrong, total, likeness = [], 0, {}
    for name, stored, again in _vectors(sidecar, found.fisher):
        total += stored.numel()
        if stored.shape != again.shape:
            wrong.append(f"{name}: stored as {list(stored.shape)}, measured again it is {list(again.shape)}")
            continue
        bad = refuted(stored, again, share, slack, floor)
        if bool(bad.any()):
            wrong.append(_example(name, stored, again, bad))
        if share < 1 and not math.isnan(correlation := _correlation(stored, again)):
            likeness[name] = correlation
    if share == 1:
        wrong += _means(metadata, found.fisher, slack)
    if wrong:
        more = f"; and so in {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return Check("numbers", "failed", "; ".join(wrong[:_SHOWN]) + more)
    if share == 1:
        return Check(
            "numbers", "ok", f"all {total:,} came out again from all {count} samples, up to rounding"
        )
    least = min(likeness, key=likeness.__getitem__, default="")
    alike = (
        f" (correlation with their own: median {median(likeness.values()):.2f}, least {likeness[least]:.2f} at {least})"
        if likeness
        else ""
    )
    return Check(
        "numbers", "plausible",
        f"none of {total:,} is below what these {count} of {metadata.samples} samples alone make of it{alike}; one that is too "
        f"high would not show. To be sure:  --recompute {metadata.samples}",
    )  # fmt: skip


def _root_mean(found: DiagonalFisher | FactoredFisher) -> float:
    """Over all parameters."""
    if isinstance(found, FactoredFisher):
        return math.sqrt(found.mean)
    count = sum(fisher.numel() for fisher in found.fisher.values())
    return math.sqrt(math.fsum(float(fisher.double().sum()) for fisher in found.fisher.values()) / count)


def _vectors(sidecar: AnySidecar, found: AnyFisher) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, stored and measured numbers of every kind of node at every site, or of every parameter or its rows and columns."""
    measured: Mapping[Any, Tensor] = found.fisher
    if isinstance(sidecar, Sidecar):
        for output, vectors in sidecar.fisher.items():
            for node, stored in vectors.items():
                yield f"{output}.{node}", stored, measured[output, node].cpu()
    elif isinstance(sidecar, FactoredSidecar):
        for name, stored in sidecar.packed.items():
            yield name, stored, measured[name].cpu()
    else:
        for record in sidecar.metadata.tensors:
            yield record.names[0], sidecar.fisher(record), measured[record.names[0]].cpu()


def _example(name: str, stored: Tensor, again: Tensor, bad: Tensor) -> str:
    """How many of a vector's numbers are wrong, and the one that is most so."""
    gap = (stored.double().sqrt() - again.double().sqrt()).abs().where(bad, -1)
    worst = torch.unravel_index(gap.argmax(), gap.shape)
    place = [int(index) for index in worst]
    return (
        f"{name}: {int(bad.sum())} of {bad.numel()} numbers; that at {place} is stored as {float(stored[worst]):.4e}, the mean "
        f"over the samples measured again is {float(again[worst]):.4e}"
    )


def _correlation(stored: Tensor, again: Tensor) -> float:
    """Of root mean square gradients; not a number where there is one only, or all are the same."""
    if stored.numel() < 2:
        return math.nan
    return float(
        torch.corrcoef(torch.stack((stored.double().flatten(), again.double().flatten())).sqrt())[0, 1]
    )


def _means(metadata: Measurement, found: AnyFisher, slack: float) -> list[str]:
    """Loss and accuracy, if they are others. Rounding may decide one sample's prediction."""
    wrong = []
    if abs(found.loss - metadata.loss) > slack * max(1, abs(found.loss)):
        wrong.append(f"the loss is stored as {metadata.loss:.6f}, measured again it is {found.loss:.6f}")
    accuracy = math.nan if metadata.accuracy is None else metadata.accuracy
    if (
        math.isnan(accuracy) != math.isnan(found.accuracy)
        or abs(accuracy - found.accuracy) > 1 / found.samples
    ):
        wrong.append(f"the accuracy is stored as {accuracy:.4f}, measured again it is {found.accuracy:.4f}")
    return wrong
