"""The pre-pass for rows and columns of all parameters: the model, its Fisher information, and the sidecar of it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit import measure_diagonal
from fisher_mask_mergekit.factored import FactoredFisher, factored_fisher
from fisher_mask_mergekit.factored_sidecar import (
    FactoredMetadata,
    FactoredRecord,
    FactoredSidecar,
    write_factored,
)
from fisher_mask_mergekit.factors import Split, piece
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.marginals import row_axes
from fisher_mask_mergekit.measure_diagonal import stored_values, unsupported, view_records
from fisher_mask_mergekit.sidecar import FORMAT_VERSION
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch

check, keys, notes = measure_diagonal.check, measure_diagonal.keys, measure_diagonal.notes


def load(job: Job, inputs: Inputs, *, in_layers: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in the dtype asked for, and the values that a merge will know its parameters by.

    Args:
        job: What is measured.
        inputs: On what.
        in_layers: Whether its layers are put on all GPUs that there are.

    Raises:
        CheckpointError: If the files hold another layout than the model in memory, or pieces of a parameter that are
            no product of rows and columns (names the tensor).
    """
    assert job.parameters is not None
    model, values = measure_diagonal.load(job, inputs, in_layers=in_layers)
    axes = row_axes(model)
    for name, view in job.parameters.views.items():
        split = Split.of(model.get_parameter(view.source).shape, axes[view.source])
        factors = torch.ones(split.groups, split.rows), torch.ones(split.groups, split.columns)
        if piece(factors, split, view.shape, view.offset, view.strides) is None:
            raise unsupported(job, f"hold {name}, whose elements are no rows and columns of {view.source}")
    return model, values


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
) -> FactoredFisher:
    """Run the samples. Activations are never computed again, and no process has only a part of the model."""
    settings = job.settings
    return factored_fisher(
        model,
        batches,
        job.task,
        by_token=settings.estimator == "token",
        labels=settings.labels,
        seed=settings.seed,
        tally=tally,
        on_batch=on_batch,
        settle=settle,
    )


def save(
    job: Job, measured: FactoredFisher, values: dict[str, Tensor], facts: dict[str, Any]
) -> FactoredSidecar:
    """Write the sidecar."""
    assert job.parameters is not None
    names = job.parameters
    records = tuple(
        FactoredRecord(
            names=names.names[name], shape=shape, axis=measured.axes[name], values=stored_values(values[name])
        )
        for name, shape in measured.shapes.items()
    )
    metadata = FactoredMetadata(
        format_version=FORMAT_VERSION,
        mean=measured.mean,
        others=names.others,
        tensors=records,
        views=view_records(names, values),
        **facts,
    )
    packed = {name: fisher.to("cpu", torch.float32) for name, fisher in measured.fisher.items()}
    sidecar = FactoredSidecar(metadata, packed, str(job.target))
    write_factored(sidecar, job.target)
    return sidecar
