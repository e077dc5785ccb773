"""The pre-pass: a job in, one sidecar out."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit import measure_diagonal, measure_mask, store
from fisher_mask_mergekit.batches import batches_in_step, dealt, lacks_for_padding, padded_batches
from fisher_mask_mergekit.checkpoint import file_states
from fisher_mask_mergekit.diagonal import DiagonalFisher
from fisher_mask_mergekit.errors import CheckpointError, SidecarError
from fisher_mask_mergekit.execution import (
    Spread,
    batch_limits,
    check_options,
    is_in_parts,
    model_errors,
    to_make_smaller,
)
from fisher_mask_mergekit.fisher import MaskFisher
from fisher_mask_mergekit.job import AnySidecar, Inputs, Job, measured_meanwhile, read_any
from fisher_mask_mergekit.placing import placed
from fisher_mask_mergekit.processes import ALONE, Processes
from fisher_mask_mergekit.sidecar import Measurement
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch


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

    fisher: MaskFisher | DiagonalFisher
    values: dict[str, Tensor]
    seconds: float
    notes: tuple[str, ...]


def compute(
    job: Job,
    device: torch.device,
    *,
    batch_tokens: int | None = None,
    recompute: bool = False,
    spread: Spread | None = None,
    on_wait: Callable[[], None] = lambda: None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    processes: Processes = ALONE,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before, or is meanwhile.

    Of several runs with one target, one measures at a time.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        device: Where to run.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        spread: How the weights are spread over GPUs.
        on_wait: Called before waiting for another process.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.
        processes: The run's, of which this is the first; the others call :func:`assist` meanwhile.

    Raises:
        FisherMaskError: On bad input, or if the checkpoint changes; nothing is written then.
    """
    if job.served is not None:
        store.clear_away(Path(job.served.source))
        processes.told(False)
        return _served(job, job.served)
    with ExitStack() as stack:
        try:
            stack.enter_context(store.alone(job.target, on_wait))
        except OSError as error:
            raise SidecarError(
                f"cannot write {job.target}: {error.strerror or error}; nothing was measured"
            ) from error
        other = measured_meanwhile(job)
        if not processes.told(other is None):
            assert other is not None
            return _served(job, other)
        replaced = _replaced(job)
        assert job.inputs is not None
        found = measure(
            job, job.inputs, device,
            batch_tokens=batch_tokens, recompute=recompute, spread=spread, on_start=on_start,
            on_batch=lambda batch, tally: on_batch(batch), processes=processes,
        )  # fmt: skip
        _check_unchanged(job)
        processes.gathered(None)  # All came as far as this.
        return _save(job, found, device, replaced)


def assist(
    job: Job,
    device: torch.device,
    processes: Processes,
    *,
    batch_tokens: int | None = None,
    recompute: bool = False,
    spread: Spread | None = None,
) -> None:
    """Measure a share of what the first process computes; it alone knows whether that is to be measured, and writes it.

    Args:
        job: As the first process has it, but that it was prepared with ``force``.
        device: Where to run.
        processes: The run's.
        batch_tokens: As the first process has it.
        recompute: Likewise.
        spread: Likewise.

    Raises:
        FisherMaskError: On bad input, or if the checkpoint changes.
    """
    if processes.told(None):
        assert job.inputs is not None
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "recompute": recompute, "spread": spread}
        measure(job, job.inputs, device, **how, processes=processes)
        _check_unchanged(job)
        processes.gathered(None)


def check_alike(jobs: Sequence[Job], processes: Processes) -> None:
    """Refuse to measure unless all processes have the same before them.

    Args:
        jobs: What is to be measured.
        processes: The run's.

    Raises:
        ProcessError: If one has something else (names it).
    """
    versions = {name: number for name, number in _versions().items() if name != "python"}
    facts = {f"versions of {name}": number for name, number in versions.items()}
    facts["models"] = ", ".join(job.checkpoint.name for job in jobs)
    for job in jobs:
        name = job.checkpoint.name
        facts[f"settings for {name}"] = str(job.settings.definition())
        facts[f"weights of {name}"] = job.weights
        facts[f"rows of {job.settings.data} for {name}"] = job.data.digest
        if job.inputs is not None:
            facts[f"tokens for {name}"] = job.inputs.encoded.digest
    processes.agree(facts)


def _served(job: Job, sidecar: AnySidecar) -> Outcome:
    path = Path(sidecar.source)
    return Outcome(sidecar, path, 0.0, True, tuple(_notes(job, sidecar.metadata, path)))


def _save(job: Job, found: Measured, device: torch.device, replaced: list[str]) -> Outcome:
    assert job.inputs is not None
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
    spread: Spread | None = None,
    processes: Processes = ALONE,
) -> Measured:
    """Load a checkpoint and run samples through it, a share of them in every process; nothing is written.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        inputs: Its samples, or some of them.
        device: Where to run.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        tally: What was summed over the first of the samples before, in the order that batches have them.
        on_start: Called before the first batch with the number of samples that are to run.
        on_batch: Called after every batch, with what was summed up to there.
        spread: How the weights are spread over GPUs.
        processes: The run's; what they measured is added up in all of them.

    Raises:
        FisherMaskError: On bad input.
    """
    check_options(job.settings, batch_tokens, recompute=recompute, spread=spread)
    kind, settings = _kind(job), job.settings
    rows, notes = settings.rows, []
    if lacking := lacks_for_padding(inputs.tokenizer):
        rows = 1
        notes.append(f"{job.checkpoint.name} has no {lacking}: measuring one sample at a time")
    agree = processes.anywhere if is_in_parts(spread) else None
    limits = batch_limits(settings, rows, batch_tokens, device, agree)
    with model_errors(job.checkpoint.name, job.model_class, to_make_smaller(settings)):
        model, values = placed(kind, job, inputs, device, spread, processes)
        by_batch = settings.estimator == "batch"
        share = dealt(inputs.encoded, processes.rank, processes.count, settings.rows if by_batch else None)
        done = tally.samples if tally else 0
        on_start(len(share.samples) - done)
        started = time.perf_counter()
        if agree:
            batches = batches_in_step(
                inputs.encoded,
                inputs.tokenizer,
                limits=limits,
                rank=processes.rank,
                count=processes.count,
                device=device,
            )
        else:
            batches = padded_batches(
                share, inputs.tokenizer, limits=limits, by_length=not by_batch, device=device, skip=done
            )
        fisher = kind.measure(
            job, model, batches,
            recompute=recompute, tally=tally, on_batch=on_batch, settle=partial(processes.added, device=device), agree=agree,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if fisher.one_by_one and rows != 1:
        notes.append(
            f"{job.checkpoint.name} does not keep a batch's samples apart: measured one sample at a time"
        )
    return Measured(fisher, values, seconds, (*notes, *kind.notes(fisher)))


def _kind(job: Job) -> Any:
    return measure_mask if job.settings.kind == "mask" else measure_diagonal


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


def _facts(
    job: Job, inputs: Inputs, measured: MaskFisher | DiagonalFisher, device: torch.device
) -> dict[str, Any]:
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
