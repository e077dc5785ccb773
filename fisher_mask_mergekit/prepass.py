"""The pre-pass: a job in, one sidecar out."""

import math
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit import measure_diagonal, measure_factored, measure_mask, store
from fisher_mask_mergekit.batches import lacks_for_padding
from fisher_mask_mergekit.checkpoint import file_states
from fisher_mask_mergekit.diagonal import DiagonalFisher
from fisher_mask_mergekit.errors import CheckpointError, SidecarError
from fisher_mask_mergekit.execution import batch_limits, check_options, model_errors, to_make_smaller
from fisher_mask_mergekit.factored import FactoredFisher
from fisher_mask_mergekit.fisher import MaskFisher
from fisher_mask_mergekit.job import AnySidecar, Inputs, Job, measured_meanwhile, read_any
from fisher_mask_mergekit.sidecar import Measurement
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch

AnyFisher = MaskFisher | FactoredFisher | DiagonalFisher


@dataclass(frozen=True)
class Outcome:
    """What :func:`compute` did.

    Attributes:
        sidecar: The measurement.
        path: Where it is.
        seconds: How long the measuring took; 0 if it was there already.
        served: Whether it was there already.
        notes: What the user should know.
    """

    sidecar: AnySidecar
    path: Path
    seconds: float
    served: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` found.

    Attributes:
        fisher: The Fisher information.
        values: What a merge will know the checkpoint's tensors by, see :func:`~fisher_mask_mergekit.recognition.probe`.
        seconds: How long the measuring took.
        notes: What the user should know.
    """

    fisher: AnyFisher
    values: dict[str, Tensor]
    seconds: float
    notes: tuple[str, ...]


def compute(
    job: Job,
    device: torch.device,
    *,
    batch_tokens: int | None = None,
    recompute: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before, or is meanwhile.

    Of several processes with one target, one measures at a time.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        device: Where to run.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        on_wait: Called before waiting for another process.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: On bad input, or if the checkpoint changes; nothing is written then.
    """
    if job.served is not None:
        store.clear_away(Path(job.served.source))
        return _served(job, job.served)
    with ExitStack() as stack:
        try:
            stack.enter_context(store.alone(job.target, on_wait))
        except OSError as error:
            raise SidecarError(
                f"cannot write {job.target}: {error.strerror or error}; nothing was measured"
            ) from error
        if (other := measured_meanwhile(job)) is not None:
            return _served(job, other)
        assert job.inputs is not None
        replaced = _replaced(job)
        found = measure(
            job, job.inputs, device,
            batch_tokens=batch_tokens, recompute=recompute, on_start=on_start,
            on_batch=lambda batch, tally: on_batch(batch),
        )  # fmt: skip
        return _save(job, found, device, replaced)


def _served(job: Job, sidecar: AnySidecar) -> Outcome:
    path = Path(sidecar.source)
    return Outcome(sidecar, path, 0.0, True, tuple(_notes(job, sidecar.metadata, path)))


def _save(job: Job, found: Measured, device: torch.device, replaced: list[str]) -> Outcome:
    assert job.inputs is not None
    _check_unchanged(job)
    facts = _facts(job, job.inputs, found.fisher, device)
    sidecar = _kind(job).save(job, found.fisher, found.values, facts)
    notes = (*replaced, *found.notes, *_notes(job, sidecar.metadata, job.target))
    return Outcome(sidecar, job.target, found.seconds, False, notes)


def measure(
    job: Job,
    inputs: Inputs,
    device: torch.device,
    *,
    batch_tokens: int | None = None,
    recompute: bool = False,
    tally: Tally[Any] | None = None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch, Tally[Any]], None] = lambda batch, tally: None,
    settle: Settle[Any] = lambda tally: tally,
) -> Measured:
    """Load a checkpoint and run samples through it; nothing is written.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        inputs: Its samples, or some of them.
        device: Where to run.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        tally: What was summed over the first of the samples before, in the order that batches have them.
        on_start: Called before the first batch with the number of samples that are to run.
        on_batch: Called after every batch, with what was summed up to there.
        settle: Called after the last batch; what it returns is made means of.

    Raises:
        FisherMaskError: On bad input.
    """
    check_options(job.settings, batch_tokens, recompute=recompute)
    kind = _kind(job)
    model, values = kind.load(job, inputs)
    rows, notes = job.settings.rows, []
    if lacking := lacks_for_padding(inputs.tokenizer):
        rows = 1
        notes.append(f"{job.checkpoint.name} has no {lacking}: measuring one sample at a time")
    on_start(len(inputs.encoded.samples) - (tally.samples if tally else 0))
    started = time.perf_counter()
    limits = batch_limits(job.settings, rows, batch_tokens, device)
    with model_errors(job.checkpoint.name, job.model_class, to_make_smaller(job.settings)):
        fisher = kind.measure(
            job, inputs, model.to(device), device, limits, recompute, tally, on_batch, settle
        )
    seconds = time.perf_counter() - started
    if fisher.one_by_one and rows != 1:
        notes.append(
            f"{job.checkpoint.name} does not keep a batch's samples apart: measured one sample at a time"
        )
    return Measured(fisher, values, seconds, (*notes, *kind.notes(fisher)))


def _kind(job: Job) -> Any:
    return {"mask": measure_mask, "factored": measure_factored, "diagonal": measure_diagonal}[
        job.settings.kind
    ]


def _check_unchanged(job: Job) -> None:
    """Refuse what may have been measured on one state of a checkpoint and be known by another."""
    now = file_states(job.checkpoint)
    changed = sorted(name for name in {**job.files, **now} if job.files.get(name) != now.get(name))
    if changed:
        raise CheckpointError(
            f"{job.checkpoint.name} changed while it was measured ({', '.join(changed[:3])}); nothing was written. "
            "Run the command again when its files stay as they are"
        )


def _replaced(job: Job) -> list[str]:
    """That an earlier measurement with other settings goes, and which settings those are."""
    try:
        earlier = read_any(job.target, job.settings.kind).metadata.settings.definition()
    except SidecarError:
        return []
    now = job.settings.definition()
    other = [f"{name} {value!r}" for name, value in earlier.items() if now.get(name, value) != value]
    return [f"replaced the sidecar measured with {', '.join(other)}; --out keeps both"] if other else []


def _facts(job: Job, inputs: Inputs, measured: AnyFisher, device: torch.device) -> dict[str, Any]:
    """What every kind of sidecar says of its measurement, as the fields of :class:`Measurement`."""
    return {
        "checkpoint": job.checkpoint.name,
        "revision": job.checkpoint.revision,
        "architecture": job.model_class.__name__,
        "task": job.task.kind,
        "weights": job.weights,
        "settings": job.settings,
        "trust_remote_code": job.trust_remote_code,
        "data": job.data,
        "samples": measured.samples,
        "max_length": inputs.max_length,
        "truncated": inputs.encoded.truncated,
        "accuracy": None if math.isnan(measured.accuracy) else measured.accuracy,
        "loss": measured.loss,
        "versions": _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _notes(job: Job, metadata: Measurement, path: Path) -> list[str]:
    """What the user should know about a measurement, fresh or not."""
    notes = []
    asked, data = job.settings.samples, metadata.data
    if data.rows < asked:
        notes.append(f"{job.settings.data} has {data.rows} rows, {asked} were asked for: used all")
    drawn = min(asked, data.rows)
    if metadata.samples < drawn:
        notes.append(
            f"{drawn - metadata.samples} of {drawn} samples held nothing to predict within {metadata.max_length} tokens "
            "and were left out"
        )
    if metadata.truncated:
        notes.append(
            f"{metadata.truncated} of {metadata.samples} samples were longer than {metadata.max_length} tokens and were "
            "truncated"
        )
    kinds = {site.kind for site in job.sites}
    if len(kinds) == 1:
        notes.append(
            f"only {kinds.pop()} sites are known for {metadata.architecture}; a merge averages the rest of it"
        )
    if (
        data.majority is not None
        and metadata.accuracy is not None
        and metadata.accuracy <= data.majority
        and metadata.accuracy < 1
    ):
        notes.append(
            f"WARNING: accuracy on the samples is {metadata.accuracy:.3f}, no better than always guessing the most "
            f"frequent label ({data.majority:.3f}). The data's labels probably do not match the checkpoint's: "
            "compare them, and use label_map."
        )
    preferred = store.find(job.checkpoint, job.settings.kind)
    if not job.elsewhere and preferred != path:
        notes.append(f"a merge prefers {preferred}; to use this one:  parameters: {{sidecar: {path}}}")
    return notes


def _versions() -> dict[str, str]:
    libraries = ("fisher-mask-mergekit", "torch", "transformers", "tokenizers", "datasets", "numpy")
    return {library: version(library) for library in libraries} | {"python": platform.python_version()}
