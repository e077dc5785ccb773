"""The pre-pass for all parameters: the model as it must be loaded, its Fisher information, and the sidecar of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.checkpoint import read_tensors, tensor_shapes
from fisher_mask_mergekit.diagonal import DiagonalFisher, diagonal_fisher
from fisher_mask_mergekit.diagonal_sidecar import (
    DiagonalMetadata,
    DiagonalSidecar,
    TensorRecord,
    plan_shards,
    write_diagonal,
)
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.factored import FactoredFisher
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.loading import load_model, settle_dtype
from fisher_mask_mergekit.parameter_names import ParameterNames
from fisher_mask_mergekit.parameter_records import ViewRecord
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.sidecar import FORMAT_VERSION
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch


def load(job: Job, inputs: Inputs, *, in_layers: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in the dtype asked for, and the values that a merge will know its parameters by.

    Args:
        job: What is measured.
        inputs: On what.
        in_layers: Whether its layers are put on all GPUs that there are.

    Raises:
        CheckpointError: If the files hold another layout than the model in memory (names the tensor).
    """
    assert job.parameters is not None
    names, dtype = job.parameters, getattr(torch, job.settings.dtype)
    sources = {name: source for source, known in names.names.items() for name in known}
    sources |= {name: view.source for name, view in names.views.items()}
    stored, wide = {}, dtype
    for name, tensor in read_tensors(job.checkpoint, sources.keys() & tensor_shapes(job.checkpoint).keys()):
        stored[name] = probe(tensor)
        if names.views:  # What only the loaded model has, fused from others, must not have lost digits yet.
            wide = torch.promote_types(wide, tensor.dtype)
    model: Any = load_model(
        job.checkpoint, job.model_class, job.config, inputs.tokenizer, wide, in_layers=in_layers
    )
    values: dict[str, Tensor] = {}
    for name, value in stored.items():
        parameter = model.get_parameter(sources[name]).detach()
        view = names.views.get(name)
        loaded = probe(view.of(parameter) if view else parameter)
        if not torch.equal(value.to(loaded.dtype), loaded):
            raise unsupported(job, f"hold {name} with other values than {sources[name]} has once loaded")
        values[name if view else sources[name]] = value
        if view:
            values.setdefault(view.source, probe(parameter))
    if lacking := sorted(names.names.keys() - values.keys()):
        raise unsupported(job, f"have no {lacking[0]}")
    settle_dtype(model, wide, dtype)
    return model, values


def unsupported(job: Job, what: str) -> CheckpointError:
    """The error of a layout that this kind cannot be measured in."""
    return CheckpointError(
        f"{job.checkpoint.name}: kind '{job.settings.kind}' does not support its layout: its files {what}"
    )


def check(job: Job, inputs: Inputs, model: nn.Module, device: torch.device) -> None:
    """A parameter is what it is: nothing is taken for anything by its name."""


def measure(
    job: Job,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    recompute: bool,
    tally: Tally[str] | None,
    on_batch: Callable[[Batch, Tally[str]], None],
    settle: Settle[str],
    agree: None,
) -> DiagonalFisher:
    """Run the samples. Activations are never computed again, and no process has only a part of the model."""
    settings = job.settings
    return diagonal_fisher(
        model,
        batches,
        job.task,
        labels=settings.labels,
        seed=settings.seed,
        tally=tally,
        on_batch=on_batch,
        settle=settle,
    )


def save(
    job: Job, measured: DiagonalFisher, values: dict[str, Tensor], facts: dict[str, Any]
) -> DiagonalSidecar:
    """Write the sidecar."""
    assert job.parameters is not None
    names = job.parameters
    shapes = {name: tuple(fisher.shape) for name, fisher in measured.fisher.items()}
    shards = plan_shards(shapes)
    count = sum(fisher.numel() for fisher in measured.fisher.values())
    mean = math.fsum(float(fisher.mean()) * fisher.numel() / count for fisher in measured.fisher.values())
    records = tuple(
        TensorRecord(
            names=names.names[name], shape=shape, shard=shards[name], values=stored_values(values[name])
        )
        for name, shape in shapes.items()
    )
    metadata = DiagonalMetadata(
        format_version=FORMAT_VERSION,
        mean=mean,
        others=names.others,
        tensors=records,
        views=view_records(names, values),
        **facts,
    )
    return write_diagonal(metadata, measured.fisher.__getitem__, job.target)


def stored_values(values: Tensor) -> tuple[float, ...]:
    """What a parameter is known by, as a record has it."""
    return tuple(values.double().tolist())


def view_records(names: ParameterNames, values: Mapping[str, Tensor]) -> tuple[ViewRecord, ...]:
    """The pieces in which the checkpoint's files hold parameters."""
    return tuple(
        ViewRecord(
            name=name,
            source=view.source,
            shape=view.shape,
            offset=view.offset,
            strides=view.strides,
            values=stored_values(values[name]),
        )
        for name, view in names.views.items()
    )


def keys(job: Job) -> dict[str, str]:
    """What is summed, by the names that a sidecar has for it."""
    assert job.parameters is not None
    return {name: name for name in job.parameters.names}


def notes(measured: DiagonalFisher | FactoredFisher) -> list[str]:
    """What the user should know of this measurement."""
    silent = sum(not bool(fisher.any()) for fisher in measured.fisher.values())
    if not silent:
        return []
    return [f"no gradient reached {silent} of {len(measured.fisher)} parameters: a merge averages them"]
