"""The pre-pass: a job in, one sidecar out."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import file_states, read_config
from fisher_mask_mergekit.errors import CheckpointError, SidecarError
from fisher_mask_mergekit.execution import PLAIN, Execution
from fisher_mask_mergekit.job import Inputs, Job, measured_meanwhile
from fisher_mask_mergekit.measuring import AnyFisher, Measured, kind_of, measure, share_of
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.partial_sums import EVERY, PartialSums
from fisher_mask_mergekit.processes import ALONE, Processes
from fisher_mask_mergekit.request import device_name, request_of, versions
from fisher_mask_mergekit.settings import RANDOM
from fisher_mask_mergekit.sidecar import Measurement
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch
from fisher_mask_mergekit.untrusted import MOST_SIDECAR_BYTES

ENOUGH = 16
"""Samples on which an accuracy says that labels do not match; on fewer a good model may be as bad by chance."""


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


def compute(
    job: Job,
    device: torch.device,
    execution: Execution = PLAIN,
    *,
    checkpoint_every: float = EVERY,
    on_wait: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda note: None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    processes: Processes = ALONE,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before, or is meanwhile.

    Of several runs with one target, one measures at a time.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        device: Where to run.
        execution: How.
        checkpoint_every: Seconds from one writing of the sums so far to the next; 0 for never, and for beginning anew
            whatever an interrupted run left.
        on_wait: Called before waiting for another process.
        on_note: Called with what the user should know while it runs.
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
        if checkpoint_every and execution.spread:
            on_note("with --spread, no sums are saved on the way: what is interrupted begins anew")
        sums = _sums(job, device, execution, checkpoint_every, on_note, processes)
        found = _measure(
            job,
            device,
            execution,
            sums,
            anew=job.force,
            on_note=on_note,
            on_start=on_start,
            on_batch=on_batch,
        )
        outcome = _save(job, found, device, replaced)
        processes.meet(waits=False)
        sums.remove()
        return outcome


def assist(
    job: Job,
    device: torch.device,
    execution: Execution,
    processes: Processes,
    *,
    anew: bool = False,
    checkpoint_every: float = EVERY,
    on_note: Callable[[str], None] = lambda note: None,
) -> None:
    """Measure a share of what the first process computes; it alone knows whether that is to be measured, and writes it.

    Args:
        job: As the first process has it, but that it was prepared with ``force``.
        device: Where to run.
        execution: As the first process has it.
        processes: The run's.
        anew: Whether the first process was to measure whatever was measured before.
        checkpoint_every: As the first process has it.
        on_note: Called with what the user should know of this process's sums.

    Raises:
        FisherMaskError: On bad input, or if the checkpoint changes.
    """
    if not processes.told(None):
        return
    sums = _sums(job, device, execution, checkpoint_every, on_note, processes)
    _measure(job, device, execution, sums, anew=anew)
    processes.meet()  # Until the sidecar is written.
    sums.remove()


def _sums(
    job: Job,
    device: torch.device,
    execution: Execution,
    every: float,
    say: Callable[[str], None],
    processes: Processes,
) -> PartialSums[Any]:
    """Where this process keeps what it sums, unless all must go on from one point, where they have a part of the model each."""
    assert job.inputs is not None
    return PartialSums(
        job.target,
        partial(request_of, job, job.inputs, device, execution),
        kind_of(job).keys(job),
        len(share_of(job, job.inputs, processes).samples),
        0 if execution.spread else every,
        say,
        processes,
    )


def _measure(
    job: Job,
    device: torch.device,
    execution: Execution,
    sums: PartialSums[Any],
    *,
    anew: bool,
    on_note: Callable[[str], None] = lambda note: None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Measured:
    """Measure a share in each of the processes, which have all the same before them; only where they run may differ.

    Raises:
        ProcessError: If one has something else (names it).
    """
    assert job.inputs is not None
    processes = sums.processes
    if processes.count > 1:
        request = {
            name: str(value) for name, value in sums.request.items() if name not in ("device", "process")
        }
        processes.agree(job.checkpoint.name, request)
    begun = sums.begin(_most_bytes(job), anew=anew)
    known = processes.gathered((begun.samples if begun else 0, sums.total))
    done, total = (sum(numbers) for numbers in zip(*known, strict=True))
    if done:
        where = sums.path if processes.count == 1 else f"in {processes.count} processes"
        on_note(f"going on after {done} of {total} samples that an interrupted run measured ({where})")

    def keep(batch: Batch, tally: Tally[Any]) -> None:
        sums.keep(tally, partial(_check_unchanged, job))
        processes.count_batch()
        on_batch(batch)

    found = measure(
        job, job.inputs, device, execution, tally=begun, on_start=on_start, on_batch=keep, processes=processes
    )
    _check_unchanged(job)
    processes.gathered(None)  # Nothing is written unless all came as far as this.
    return found


def _most_bytes(job: Job) -> int:
    """Of partial sums, which may be as large as a model in float64."""
    return MOST_SIDECAR_BYTES + 8 * sum(size for _, size, _ in job.files.values())


def _served(job: Job, sidecar: AnySidecar) -> Outcome:
    path = Path(sidecar.source)
    return Outcome(sidecar, path, 0.0, True, tuple(_notes(job, sidecar.metadata, path)))


def _save(job: Job, found: Measured, device: torch.device, replaced: list[str]) -> Outcome:
    assert job.inputs is not None
    facts = _facts(job, job.inputs, found.fisher, device)
    sidecar = kind_of(job).save(job, found.fisher, found.values, facts)
    notes = (*replaced, *found.notes, *_notes(job, sidecar.metadata, job.target))
    return Outcome(sidecar, job.target, found.seconds, False, notes)


def _check_unchanged(job: Job) -> None:
    """Refuse what may have been measured on one state of a checkpoint and be known by another."""
    now = file_states(job.checkpoint)
    changed = sorted(name for name in {**job.files, **now} if job.files.get(name) != now.get(name))
    if changed:
        store.remove_partials(job.target)  # Nobody knows of which state the sums are.
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
        "versions": versions(),
        "device": device_name(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _notes(job: Job, metadata: Measurement, path: Path) -> list[str]:
    """What the user should know about a measurement, fresh or not."""
    notes = []
    asked, data = job.settings.samples, metadata.data
    if data.rows < asked:
        notes.append(f"{job.settings.data} has {data.rows} rows, {asked} were asked for: used all")
    drawn = min(asked, data.rows)
    if (share := job.settings.share) is not None:
        notes.append(
            f"{path} is share {share}; when all are measured, add them up:  mergekit-fisher combine SHARE... --out SIDECAR"
        )
    elif metadata.samples < drawn:
        notes.append(
            f"{drawn - metadata.samples} of {drawn} samples held nothing to predict within {metadata.max_length} tokens "
            "and were left out"
        )
    if metadata.truncated and metadata.settings.data != RANDOM:  # Random tokens are none the worse for it.
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
        and metadata.samples >= ENOUGH
    ):
        notes.append(
            f"WARNING: accuracy on the samples is {metadata.accuracy:.3f}, no better than always guessing the most "
            f"frequent label ({data.majority:.3f}). The data's labels probably do not match the checkpoint's: "
            "compare them, and use label_map."
        )
    guess = math.log(_vocabulary(job) or math.inf)
    predicts_tokens = (
        metadata.task in ("causal-lm", "masked-lm", "seq2seq-lm") and metadata.settings.loss == "mean"
    )
    if (
        predicts_tokens
        and metadata.settings.data != RANDOM
        and metadata.samples >= ENOUGH
        and metadata.loss > guess
    ):
        notes.append(
            f"WARNING: the loss is {metadata.loss:.2f} nats a token, where guessing evenly among all tokens costs {guess:.2f}. "
            "The tokenizer probably does not belong to the weights, or the data are not what the checkpoint was trained on."
        )
    preferred = store.find(job.checkpoint, job.settings.kind)
    if not job.elsewhere and share is None and preferred != path:
        notes.append(f"a merge prefers {preferred}; to use this one:  parameters: {{sidecar: {path}}}")
    return notes


def _vocabulary(job: Job) -> int | None:
    """How many tokens the checkpoint's model knows, if its configuration says so."""
    config = read_config(job.checkpoint)
    of_text = config.get("text_config")
    size = config.get("vocab_size", of_text.get("vocab_size") if isinstance(of_text, dict) else None)
    return size if isinstance(size, int) and size > 1 else None
