"""The pre-pass: one checkpoint and a request in, one sidecar out."""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisher_mask_mergekit import store
from fisher_mask_mergekit.batches import EncodedSamples, encode_samples, lacks_for_padding, padded_batches
from fisher_mask_mergekit.checkpoint import (
    Checkpoint,
    locate,
    read_tensors,
    tensor_shapes,
    transformers_errors,
)
from fisher_mask_mergekit.data import Samples, hub_revision, load_samples, parse_spec
from fisher_mask_mergekit.errors import (
    CheckpointError,
    MeasurementError,
    RecipeError,
    SidecarError,
)
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.loading import class_of, load_config, load_model, load_tokenizer, longest
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import (
    FORMAT_VERSION,
    DataRecord,
    Metadata,
    Sidecar,
    digest_of,
    may_replace,
    probe,
    read,
    write,
)
from fisher_mask_mergekit.sites import Site, stack_of
from fisher_mask_mergekit.skeleton import sites_of, skeleton
from fisher_mask_mergekit.tasks import Batch, Task, Tokenization, task_of


@dataclass(frozen=True)
class Inputs:
    """The samples as the model takes them.

    Attributes:
        tokenizer: The checkpoint's.
        max_length: Tokens per sample at most.
        encoded: The samples.
    """

    tokenizer: Any
    max_length: int
    encoded: EncodedSamples


@dataclass(frozen=True)
class Job:
    """A request that was looked into: all that can be wrong without measuring is not.

    Attributes:
        checkpoint: What to measure.
        config: Its transformers configuration.
        model_class: What it is loaded with.
        task: What its loss is.
        sites: Its mask nodes.
        weights: Digest of its tensors.
        settings: The request.
        data: What to measure on.
        inputs: The same for the model; None if ``served``.
        target: Where the sidecar goes.
        elsewhere: Whether ``target`` is not a place where a merge looks by itself.
        served: The sidecar that answers the request already, if there is one.
    """

    checkpoint: Checkpoint
    config: Any
    model_class: Any
    task: Task
    sites: tuple[Site, ...]
    weights: str
    settings: FisherSettings
    data: DataRecord
    inputs: Inputs | None
    target: Path
    elsewhere: bool
    served: Sidecar | None


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
            torch.ones(1, device=name).item()
            return torch.device(name)
        except (RuntimeError, AssertionError) as error:  # Not a device, not there, or "meta".
            raise RecipeError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    for kind in ("cuda", "xpu", "mps"):
        if (torch.backends.mps if kind == "mps" else getattr(torch, kind)).is_available():
            return torch.device(kind)
    return torch.device("cpu")


def prepare(
    name: str,
    settings: FisherSettings,
    *,
    out: Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Job:
    """Find the checkpoint, its mask nodes and the samples, and see whether they were measured before.

    Args:
        name: Local folder or hub id.
        settings: The request; ``data`` must be given.
        out: Where to write; beside a local checkpoint, else to the cache, if not given.
        force: Measure even if the same request was measured before.
        trust_remote_code: Whether to run code that comes with the checkpoint.

    Raises:
        FisherMaskError: On bad input.
    """
    checkpoint = locate(name)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    task = task_of(config, name, settings)
    kind = class_of(checkpoint, config, task, trust_remote_code=trust_remote_code)
    shapes = tensor_shapes(checkpoint)
    with transformers_errors(checkpoint):
        model = skeleton(kind, deepcopy(config))
    sites = _find_sites(checkpoint, model, shapes)
    if out is not None and not may_replace(out):
        raise SidecarError(f"{out} exists and is no sidecar; it was left as it is")
    weights = digest_of(read_tensors(checkpoint, shapes))
    found = None
    for path in () if force else [out] if out else store.find_all(checkpoint):
        found = found or _same_request(path, weights, settings, task)
    samples: Any = None
    if found is None or parse_spec(settings.data or "").is_local:
        samples = load_samples(settings, task)
        if found is not None and found.metadata.data.digest != samples.record.digest:
            found = None
    inputs = None
    if found is None:
        tokenizer = load_tokenizer(checkpoint, task, trust_remote_code=trust_remote_code)
        inputs = _inputs(name, samples, task, model, tokenizer, settings)
    return Job(
        checkpoint=checkpoint,
        config=config,
        model_class=kind,
        task=task,
        sites=sites,
        weights=weights,
        settings=settings,
        data=found.metadata.data if found else samples.record,
        inputs=inputs,
        target=out or store.destination(checkpoint),
        elsewhere=out is not None,
        served=found,
    )


def _inputs(
    name: str, samples: Samples, task: Task, model: nn.Module, tokenizer: Any, settings: FisherSettings
) -> Inputs:
    lacking = lacks_for_padding(tokenizer)
    if settings.estimator == "batch" and lacking:
        raise CheckpointError(f"{name} has no {lacking}, so estimator 'batch' cannot batch its samples")
    max_length = longest(model, tokenizer, settings)
    how = Tokenization(tokenizer, max_length, settings.seed)
    try:
        return Inputs(tokenizer, max_length, encode_samples(samples, task, how))
    except CheckpointError as error:  # A task does not know what the checkpoint is called.
        raise CheckpointError(f"{name}: {error}") from error


def compute(
    job: Job,
    device: torch.device,
    *,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Outcome:
    """Measure a checkpoint and write its sidecar, unless the same request was measured before.

    Args:
        job: What :func:`prepare` found.
        device: Where to run.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: On bad input; nothing is written then.
    """
    if job.served is not None:
        path = Path(job.served.source)
        return Outcome(job.served, path, 0.0, True, tuple(_notes(job, job.served.metadata, path)))
    assert job.inputs is not None
    checkpoint, settings, inputs = job.checkpoint, job.settings, job.inputs
    shapes = tensor_shapes(checkpoint)
    names = {tensor.name for site in job.sites for tensor in site.tensors}
    on_disk = names & shapes.keys()
    model = load_model(checkpoint, job.model_class, job.config, inputs.tokenizer, settings)
    values = {name: probe(model.get_parameter(name)) for name in names - on_disk}
    batch_size, notes = settings.batch_size, []
    if lacking := lacks_for_padding(inputs.tokenizer):
        batch_size = 1
        notes.append(f"{checkpoint.name} has no {lacking}: measuring one sample at a time")
    batches = padded_batches(
        inputs.encoded,
        inputs.tokenizer,
        batch_size=batch_size,
        by_length=settings.estimator == "sample",
        device=device,
    )
    on_start(len(inputs.encoded.samples))
    started = time.perf_counter()
    with _out_of_memory(batch_size):
        measured = mask_fisher(
            model.to(device),
            batches,
            job.sites,
            job.task,
            labels=settings.labels,
            estimator=settings.estimator,
            mask_placement=settings.mask_placement,
            seed=settings.seed,
            on_batch=on_batch,
        )
    seconds = time.perf_counter() - started
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        architecture=job.model_class.__name__,
        task=job.task.kind,
        weights=job.weights,
        settings=settings,
        data=job.data,
        samples=measured.samples,
        max_length=inputs.max_length,
        truncated=inputs.encoded.truncated,
        accuracy=None if math.isnan(measured.accuracy) else measured.accuracy,
        loss=measured.loss,
        versions=_versions(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        sites=job.sites,
    )
    fisher = {
        site.output: {
            node: measured.fisher[site.output, node].to("cpu", torch.float32) for node in site.nodes()
        }
        for site in job.sites
    }
    values |= {tensor: probe(value) for tensor, value in read_tensors(checkpoint, on_disk)}
    sidecar = Sidecar(metadata, fisher, values, str(job.target))
    write(sidecar, job.target)
    if measured.one_by_one and batch_size > 1:
        notes.append(
            f"{checkpoint.name} does not keep a batch's samples apart: measured one sample at a time"
        )
    if measured.unreached:
        stacks = sorted({stack_of(output) for output in measured.unreached})
        notes.append(f"no sample ran through {', '.join(stacks)}: a merge averages it")
    return Outcome(sidecar, job.target, seconds, False, (*notes, *_notes(job, metadata, job.target)))


def _notes(job: Job, metadata: Metadata, path: Path) -> list[str]:
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
    preferred = store.find(job.checkpoint)
    if not job.elsewhere and preferred != path:
        notes.append(f"a merge prefers {preferred}; to use this one:  parameters: {{sidecar: {path}}}")
    return notes


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


def _same_request(path: Path, weights: str, settings: FisherSettings, task: Task) -> Sidecar | None:
    """The sidecar at ``path`` if it answers this very request for these very weights.

    Data on the hub must still be of the commit that was measured, if the hub can be asked; data here is for
    the caller to compare.
    """
    try:
        sidecar = read(path)
    except SidecarError:
        return None
    spec = parse_spec(settings.data or "")
    if sidecar.metadata.settings != settings or sidecar.metadata.weights != weights:
        return None
    if sidecar.metadata.task != task.kind:  # The task may hang on the configuration, which is not a weight.
        return None
    if not spec.is_local and hub_revision(spec) not in (sidecar.metadata.data.revision, None):
        return None
    return sidecar


def _find_sites(
    checkpoint: Checkpoint, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Site, ...]:
    try:
        sites = sites_of(model, shapes)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    if not sites:
        prefixes = sorted({".".join(name.split(".")[:3]) for name in shapes})
        raise CheckpointError(
            f"no mask site is known for {checkpoint.name} ({type(model).__name__}); its tensors begin with "
            f"{', '.join(prefixes[:8])}"
        )
    return sites
