"""The pre-pass: a job in, one sidecar out."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from fisher_mask_mergekit import measure_diagonal, measure_mask, store
from fisher_mask_mergekit.batches import Limit, growing_limits, lacks_for_padding
from fisher_mask_mergekit.diagonal import DiagonalFisher
from fisher_mask_mergekit.errors import (
    FisherMaskError,
    MeasurementError,
    RecipeError,
    SidecarError,
    first_line,
)
from fisher_mask_mergekit.fisher import MaskFisher
from fisher_mask_mergekit.job import AnySidecar, Inputs, Job
from fisher_mask_mergekit.passes import is_out_of_memory
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Measurement, read
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


def pick_device(name: str | None) -> torch.device:
    """The device to measure on: the one asked for, else cuda, else xpu, mps, cpu.

    Raises:
        RecipeError: If torch does not know it, or it is not there.
    """
    if name is not None:
        try:
            torch.ones(1, device=name).item()
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:  # Not a device, not there, or "meta".
            raise RecipeError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    for kind in ("cuda", "xpu", "mps"):
        if (torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def compute(
    job: Job,
    device: torch.device,
    *,
    batch_tokens: int | None = None,
    recompute: bool = False,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        device: Where to run.
        batch_tokens: Tokens per batch at most, padding included; as many as pay and fit, if not given.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: On bad input; nothing is written then.
    """
    if job.served is not None:
        path = Path(job.served.source)
        return Outcome(job.served, path, 0.0, True, tuple(_notes(job, job.served.metadata, path)))
    assert job.inputs is not None
    kind: Any = measure_mask if job.settings.kind == "mask" else measure_diagonal
    model, values = kind.load(job, job.inputs)
    rows, notes = job.settings.rows, []
    if lacking := lacks_for_padding(job.inputs.tokenizer):
        rows = 1
        notes.append(f"{job.checkpoint.name} has no {lacking}: measuring one sample at a time")
    notes += _replaced(job)
    on_start(len(job.inputs.encoded.samples))
    started = time.perf_counter()
    limits = _limits(job.settings, rows, batch_tokens, device)
    with model_errors(job.checkpoint.name, job.model_class, "--batch-tokens or max_length, --recompute"):
        measured = kind.measure(job, job.inputs, model.to(device), device, limits, recompute, on_batch)
    seconds = time.perf_counter() - started
    sidecar = kind.save(job, measured, values, _facts(job, job.inputs, measured, device))
    if measured.one_by_one and rows != 1:
        notes.append(
            f"{job.checkpoint.name} does not keep a batch's samples apart: measured one sample at a time"
        )
    notes += kind.notes(measured)
    return Outcome(sidecar, job.target, seconds, False, (*notes, *_notes(job, sidecar.metadata, job.target)))


def _limits(
    settings: FisherSettings, rows: int | None, tokens: int | None, device: torch.device
) -> Iterator[Limit]:
    """Of the batches.

    Raises:
        RecipeError: If batches are told apart by their tokens where they are part of the definition.
    """
    if settings.estimator == "batch":
        if tokens is not None:
            raise RecipeError(
                "estimator 'batch' squares the gradients of batches of batch_size samples; it takes no --batch-tokens"
            )
        return repeat(Limit(rows=rows))
    return growing_limits(device, rows) if tokens is None else repeat(Limit(tokens, rows))


def _replaced(job: Job) -> list[str]:
    """That an earlier measurement with other settings goes, and which settings those are."""
    try:
        earlier = read(job.target).metadata.settings.definition()
    except SidecarError:
        return []
    now = job.settings.definition()
    other = [f"{name} {earlier[name]!r}" for name in now if earlier[name] != now[name]]
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
    libraries = ("fisher-mask-mergekit", "torch", "transformers", "datasets")
    return {library: version(library) for library in libraries} | {"python": platform.python_version()}


@contextmanager
def model_errors(name: str, kind: Any, smaller: str) -> Iterator[None]:
    """Turn what a model says of its inputs into one error.

    Args:
        name: The checkpoint.
        kind: Its class.
        smaller: What to make smaller where memory lacks.
    """
    try:
        yield
    except FisherMaskError:
        raise
    except Exception as error:  # Whatever the architecture's code raises.
        if is_out_of_memory(error):
            raise MeasurementError(
                f"the device has too little memory for {name}; take a smaller {smaller}, or dtype bfloat16"
            ) from error
        raise MeasurementError(
            f"{name} ({kind.__name__}) cannot be run on these samples: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
