"""A request looked into: the checkpoint, its mask nodes and the samples, and whether they were measured before."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from fisher_mask_mergekit import store
from fisher_mask_mergekit.batches import lacks_for_padding
from fisher_mask_mergekit.checkpoint import (
    Checkpoint,
    file_states,
    locate,
    read_tensors,
    tensor_shapes,
    transformers_errors,
)
from fisher_mask_mergekit.data import Samples, hub_revision, load_samples, parse_spec
from fisher_mask_mergekit.diagonal_sidecar import may_replace_diagonal
from fisher_mask_mergekit.encoding import EncodedSamples, encode_samples
from fisher_mask_mergekit.errors import CheckpointError, DataError, SidecarError, SidecarShareError
from fisher_mask_mergekit.loading import class_of, load_config, load_tokenizer, longest
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.parameter_names import ParameterNames, parameter_names
from fisher_mask_mergekit.random_text import Vocabulary
from fisher_mask_mergekit.settings import FisherSettings, Kind
from fisher_mask_mergekit.sidecar import DataRecord, Sidecar, digest_of, may_replace
from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.skeleton import sites_of, skeleton
from fisher_mask_mergekit.tasks import Task, Tokenization, task_of


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
        sites: Its mask nodes; none if those are not what is measured.
        parameters: What its parameters are called, if they are what is measured.
        weights: Digest of its tensors.
        files: The state that its files were in before any was read.
        settings: The request.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        data: What to measure on.
        inputs: The same for the model; None if ``served``.
        target: Where the sidecar goes.
        elsewhere: Whether ``target`` is not a place where a merge looks by itself.
        force: Whether to measure whatever was measured before.
        served: The sidecar that answers the request already, if there is one.
    """

    checkpoint: Checkpoint
    config: Any
    model_class: Any
    task: Task
    sites: tuple[Site, ...]
    parameters: ParameterNames | None
    weights: str
    files: dict[str, tuple[int, int, int]]
    settings: FisherSettings
    trust_remote_code: bool
    data: DataRecord
    inputs: Inputs | None
    target: Path
    elsewhere: bool
    force: bool
    served: AnySidecar | None


def prepare(
    name: str,
    settings: FisherSettings,
    *,
    out: Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    writes: bool = True,
) -> Job:
    """Find the checkpoint, its mask nodes and the samples, and see whether they were measured before.

    Args:
        name: Local folder or hub id.
        settings: The request; ``data`` must be given.
        out: Where to write; beside a local checkpoint, else to the cache, if not given.
        force: Measure even if the same request was measured before.
        trust_remote_code: Whether to run code that comes with the checkpoint.
        writes: Whether a sidecar will be written; if not, anything may lie where it would go.

    Raises:
        FisherMaskError: On bad input.
    """
    checkpoint = locate(name)
    files = file_states(checkpoint)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    task = task_of(config, name, settings)
    kind = class_of(checkpoint, config, task, trust_remote_code=trust_remote_code)
    shapes = tensor_shapes(checkpoint)
    with transformers_errors(checkpoint):
        model = skeleton(kind, deepcopy(config))
    is_mask = settings.kind == "mask"
    sites = _find_sites(checkpoint, model, shapes) if is_mask else ()
    parameters = None if is_mask else _find_parameters(checkpoint, model, shapes, settings.kind)
    target = out or store.of_share(store.destination(checkpoint, settings.kind), settings.share)
    if writes and not _may_write(target, settings.kind, chosen=out is not None):
        raise SidecarError(f"{target} exists and is no sidecar; it was left as it is")
    if writes and not force and settings.share is None:
        _keep_share(target, settings.kind)
    weights = digest_of(read_tensors(checkpoint, shapes))
    places = () if force else [target] if out or settings.share else store.find_all(checkpoint, settings.kind)
    answers = (_same_request(path, weights, settings, task, sites) for path in places)
    found = next((sidecar for sidecar in answers if sidecar and _is_of_today(sidecar)), None)
    samples: Any = None
    spec = parse_spec(settings.data or "")
    tokenizer = cache(partial(load_tokenizer, checkpoint, task, trust_remote_code=trust_remote_code))
    if found is None or spec.is_local:
        vocabulary = None
        if spec.is_random:
            vocabulary = Vocabulary(tokenizer(), model.get_input_embeddings().weight.shape[0])
        samples = load_samples(settings, task, vocabulary=vocabulary)
        if found is not None and found.metadata.data.digest != samples.record.digest:
            found = None
    inputs = None
    if found is None:
        inputs = _inputs(name, samples, task, model, tokenizer(), settings)
    return Job(
        checkpoint=checkpoint,
        config=config,
        model_class=kind,
        task=task,
        sites=sites,
        parameters=parameters,
        weights=weights,
        files=files,
        settings=settings,
        trust_remote_code=trust_remote_code,
        data=found.metadata.data if found else samples.record,
        inputs=inputs,
        target=target,
        elsewhere=out is not None,
        force=force,
        served=found,
    )


def _keep_share(target: Path, kind: Kind) -> None:
    """Refuse to replace a share of a measurement by a whole one: it may be hours of a machine's work."""
    try:
        share = read_any(target, kind).metadata.settings.share
    except SidecarError:
        return
    if share is not None:
        raise SidecarShareError(
            f"{target} is share {share} of a measurement, and was left as it is. Take another place (--out, or the recipe's "
            "sidecar), or replace it with --force"
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
        return Inputs(tokenizer, max_length, _share(encode_samples(samples, task, how), settings))
    except CheckpointError as error:  # A task does not know what the checkpoint is called.
        raise CheckpointError(f"{name}: {error}") from error


def _share(encoded: EncodedSamples, settings: FisherSettings) -> EncodedSamples:
    if settings.share is None:
        return encoded
    share = encoded.part(settings.in_share)
    if not share.samples:
        raise DataError(
            f"share {settings.share} of {len(encoded.samples)} samples holds none; take fewer shares, or smaller batches"
        )
    return share


def measured_meanwhile(job: Job) -> AnySidecar | None:
    """What another process has written since the request was looked into, if that answers it."""
    if job.force:
        return None
    found = _same_request(job.target, job.weights, job.settings, job.task, job.sites)
    return found if found and found.metadata.data.digest == job.data.digest else None


def _may_write(target: Path, kind: Kind, *, chosen: bool) -> bool:
    """Whether nothing but a sidecar can be lost: only what the user chose can be anything else's, or a folder."""
    if kind == "diagonal":
        return may_replace_diagonal(target)
    return not chosen or may_replace(target)


def _same_request(
    path: Path, weights: str, settings: FisherSettings, task: Task, sites: tuple[Site, ...]
) -> AnySidecar | None:
    """The sidecar at ``path`` if it answers this very request for these very weights.

    Whether the data is still what it was is for the caller to compare.
    """
    try:
        sidecar = read_any(path, settings.kind)
    except SidecarError:
        return None
    # As JSON has them: its keys are texts, so a label_map of numbers comes back as one of texts.
    asked, known = (one.definition() for one in (settings, sidecar.metadata.settings))
    if known != asked or sidecar.metadata.weights != weights:
        return None
    if isinstance(sidecar, Sidecar) and sidecar.metadata.sites != sites:  # Of another version's table.
        return None
    if sidecar.metadata.task != task.kind:  # The task may hang on the configuration, which is not a weight.
        return None
    return sidecar


def _is_of_today(sidecar: AnySidecar) -> bool:
    """Whether data on the hub is still of the commit that was measured, if the hub can be asked."""
    spec = parse_spec(sidecar.metadata.settings.data or "")
    return spec.is_local or hub_revision(spec) in (sidecar.metadata.data.revision, None)


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


def _find_parameters(
    checkpoint: Checkpoint, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], kind: Kind
) -> ParameterNames:
    try:
        return parameter_names(model, shapes)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.name}: kind '{kind}' does not support its layout: {error}"
        ) from error
