"""The pre-pass: one checkpoint and a request in, one sidecar out."""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import Checkpoint, locate, read_config, read_tensors, tensor_shapes
from fisher_mask_mergekit.data import Samples, hub_revision, load_samples, parse_spec, token_batches
from fisher_mask_mergekit.errors import (
    CheckpointError,
    FisherMaskError,
    MeasurementError,
    RecipeError,
    SidecarError,
    first_line,
)
from fisher_mask_mergekit.fisher import Batch, mask_fisher
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import FORMAT_VERSION, Metadata, Sidecar, probe, read, write
from fisher_mask_mergekit.sites import Site, find_sites
from fisher_mask_mergekit.tasks import check_task

_LONGEST = 512
"""Tokens per sample at most, unless asked for more."""


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

    sidecar: Sidecar
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
            torch.empty(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    for kind in ("cuda", "xpu", "mps"):
        if (torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def compute(
    name: str,
    settings: FisherSettings,
    *,
    device: torch.device,
    out: Path | None = None,
    force: bool = False,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before.

    Args:
        name: Local folder or hub id.
        settings: The request; ``data`` must be given.
        device: Where to run.
        out: Where to write; beside a local checkpoint, else to the cache, if not given.
        force: Measure even if the same request was measured before.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: On bad input; nothing is written then.
    """
    checkpoint = locate(name)
    config = _transformers_config(checkpoint)
    check_task(config, name)
    sites = _find_sites(checkpoint, config)
    target = out or store.destination(checkpoint)
    for path in [target] if out else store.find_all(checkpoint):
        if not force and (served := _same_request(path, checkpoint, settings, config.label2id)) is not None:
            return Outcome(served, path, 0.0, True, ())
    samples = load_samples(settings, config.label2id)
    model, tokenizer = _load(checkpoint, config, settings)
    batch_size, notes = _batching(name, tokenizer, settings, len(samples.texts))
    max_length = _max_length(model, tokenizer, settings)
    batches = token_batches(
        samples,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        by_length=settings.estimator == "sample",
        device=device,
    )
    on_start(len(samples.texts))
    started = time.perf_counter()
    with _out_of_memory(batch_size):
        measured = mask_fisher(
            model.to(device),
            batches,
            sites,
            labels=settings.labels,
            estimator=settings.estimator,
            mask_placement=settings.mask_placement,
            seed=settings.seed,
            on_batch=on_batch,
        )
    seconds = time.perf_counter() - started
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        checkpoint=name,
        revision=checkpoint.revision,
        architecture=config.architectures[0],
        settings=settings,
        data=samples.record,
        samples=measured.samples,
        max_length=max_length,
        accuracy=measured.accuracy,
        loss=measured.loss,
        versions=_versions(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        sites=sites,
    )
    fisher = {
        site.output: {
            node: measured.fisher[site.output, node].to("cpu", torch.float32) for node in site.nodes()
        }
        for site in sites
    }
    names = [tensor.name for site in sites for tensor in site.tensors]
    values = {tensor: probe(value) for tensor, value in read_tensors(checkpoint, names)}
    sidecar = Sidecar(metadata, fisher, values, str(target))
    write(sidecar, target)
    notes += _label_warning(samples, measured.accuracy)
    if out is None and (preferred := store.find(checkpoint)) != target:
        notes.append(f"a merge prefers {preferred}; to use this one:  parameters: {{sidecar: {target}}}")
    return Outcome(sidecar, target, seconds, False, tuple(notes))


def _batching(name: str, tokenizer: Any, settings: FisherSettings, rows: int) -> tuple[int, list[str]]:
    """Samples per batch, and what the user should know about it and about their number."""
    notes = []
    if rows < settings.samples:
        notes.append(f"{settings.data} has {rows} rows, {settings.samples} were asked for: used all")
    if tokenizer.pad_token_id is not None:
        return settings.batch_size, notes
    if settings.estimator == "batch":
        raise CheckpointError(f"{name} has no padding token, so estimator 'batch' cannot batch its samples")
    return 1, [*notes, f"{name} has no padding token: measuring one sample at a time"]


def _versions() -> dict[str, str]:
    libraries = ("fisher-mask-mergekit", "torch", "transformers", "datasets")
    return {library: version(library) for library in libraries} | {"python": platform.python_version()}


@contextmanager
def _out_of_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            f"the device has too little memory for batches of {batch_size}; take a smaller batch_size, or dtype bfloat16"
        ) from error


def _same_request(
    path: Path, checkpoint: Checkpoint, settings: FisherSettings, label2id: Mapping[str, int]
) -> Sidecar | None:
    """The sidecar at ``path`` if it answers this very request for this very checkpoint and data."""
    try:
        sidecar = read(path)
        if sidecar.metadata.settings != settings:
            return None
        sidecar.check_values(read_tensors(checkpoint, sidecar.governed))
    except (SidecarError, CheckpointError):
        return None
    measured = sidecar.metadata.data
    spec = parse_spec(settings.data or "")
    if spec.is_local:
        unchanged = load_samples(settings, label2id).record.digest == measured.digest
    else:
        unchanged = hub_revision(spec) in (measured.revision, None)
    return sidecar if unchanged else None


def _transformers_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    read_config(checkpoint)
    with _transformers_errors(checkpoint):
        return AutoConfig.from_pretrained(checkpoint.folder)


def _load(checkpoint: Checkpoint, config: Any, settings: FisherSettings) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with _transformers_errors(checkpoint):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            checkpoint.folder, config=config, dtype=getattr(torch, settings.dtype), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.name} has no {', '.join(sorted(report['missing_keys'])[:4])}: it is not a complete "
            f"{config.architectures[0]}"
        )
    text_config = config.get_text_config()
    if text_config.pad_token_id is None and tokenizer.pad_token_id is not None:
        text_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@contextmanager
def _transformers_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except FisherMaskError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError and others.
        raise CheckpointError(f"transformers cannot load {checkpoint.name}: {first_line(error)}") from error


def _find_sites(checkpoint: Checkpoint, config: Any) -> tuple[Site, ...]:
    shapes = tensor_shapes(checkpoint)
    try:
        sites = find_sites(shapes, config.get_text_config().num_attention_heads)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    if not sites:
        prefixes = sorted({".".join(name.split(".")[:3]) for name in shapes})
        raise CheckpointError(
            f"no mask site is known for {checkpoint.name} ({config.architectures[0]}); its tensors begin with "
            f"{', '.join(prefixes[:8])}"
        )
    return sites


def _max_length(model: nn.Module, tokenizer: Any, settings: FisherSettings) -> int:
    """What was asked for, but no more than the checkpoint can take; 512 at most if nothing was asked."""
    limits = [tokenizer.model_max_length]
    for module_name, module in model.named_modules():
        if module_name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    return int(min(settings.max_length or _LONGEST, *limits, math.inf))


def _label_warning(samples: Samples, accuracy: float) -> list[str]:
    share = max(samples.labels.count(label) for label in set(samples.labels)) / len(samples.labels)
    if accuracy > share or accuracy == 1:
        return []
    return [
        f"WARNING: accuracy on the samples is {accuracy:.3f}, no better than always guessing the most frequent "
        f"label ({share:.3f}). The data's labels probably do not match the checkpoint's: compare them, and use "
        "label_map."
    ]
