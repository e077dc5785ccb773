"""The pre-pass for mask nodes: the model as it must be loaded, its Fisher information, and the sidecar of it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.batches import Limit, padded_batches
from fisher_mask_mergekit.checkpoint import read_tensors, tensor_shapes
from fisher_mask_mergekit.fisher import MaskFisher, mask_fisher
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.layout_check import check_layout
from fisher_mask_mergekit.loading import load_model, settle_dtype
from fisher_mask_mergekit.passes import Agree
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.sidecar import FORMAT_VERSION, Metadata, Sidecar, fisher_dtype, write
from fisher_mask_mergekit.sites import NodeKey, stack_of
from fisher_mask_mergekit.skeleton import sites_in
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch


def load(job: Job, inputs: Inputs, *, in_layers: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in the dtype asked for, and the values that a merge will know its governed tensors by.

    Args:
        job: What is measured.
        inputs: On what.
        in_layers: Whether its layers are put on all GPUs that there are.
    """
    dtype = getattr(torch, job.settings.dtype)
    names = {tensor.name for site in job.sites for tensor in site.tensors}
    filed = names & tensor_shapes(job.checkpoint).keys()
    made = names - filed
    values, wide = {}, dtype
    for name, tensor in read_tensors(job.checkpoint, filed):
        values[name] = probe(tensor)
        if made:  # What only the loaded model has, fused from others, must not have lost digits yet.
            wide = torch.promote_types(wide, tensor.dtype)
    model: Any = load_model(
        job.checkpoint, job.model_class, job.config, inputs.tokenizer, wide, in_layers=in_layers
    )
    values |= {name: probe(model.get_parameter(name)) for name in made}
    settle_dtype(model, wide, dtype)
    return model, values


def check(job: Job, inputs: Inputs, model: nn.Module, device: torch.device) -> None:
    """Whether the rows taken to be its nodes' are, by the longest sample.

    Raises:
        MeasurementError: If not.
    """
    longest = next(
        padded_batches(inputs.encoded, inputs.tokenizer, limits=Limit(rows=1), by_length=True, device=device)
    )
    check_layout(model, job.task, longest, sites_in(model))


def measure(
    job: Job,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    recompute: bool,
    tally: Tally[NodeKey] | None,
    on_batch: Callable[[Batch, Tally[NodeKey]], None],
    settle: Settle[NodeKey],
    agree: Agree | None,
) -> MaskFisher:
    """Run the samples."""
    settings = job.settings
    return mask_fisher(
        model,
        batches,
        sites_in(model),  # As the model in memory is laid out, whatever the files are.
        job.task,
        labels=settings.labels,
        estimator=settings.estimator,
        mask_placement=settings.mask_placement,
        seed=settings.seed,
        recompute=recompute,
        tally=tally,
        on_batch=on_batch,
        settle=settle,
        agree=agree,
    )


def save(job: Job, measured: MaskFisher, values: dict[str, Tensor], facts: dict[str, Any]) -> Sidecar:
    """Write the sidecar."""
    dtype = fisher_dtype(job.settings)
    fisher = {
        site.output: {node: measured.fisher[site.output, node].to("cpu", dtype) for node in site.nodes()}
        for site in job.sites
    }
    metadata = Metadata(format_version=FORMAT_VERSION, sites=job.sites, **facts)
    sidecar = Sidecar(metadata, fisher, values, str(job.target))
    write(sidecar, job.target)
    return sidecar


def keys(job: Job) -> dict[str, NodeKey]:
    """What is summed, by the names that a sidecar has for it."""
    return {f"{site.output}.{node}": (site.output, node) for site in job.sites for node in site.nodes()}


def notes(measured: MaskFisher) -> list[str]:
    """What the user should know of this measurement."""
    if not measured.unreached:
        return []
    reached = {stack_of(output) for output, _ in measured.fisher if output not in measured.unreached}
    whole = dict.fromkeys(
        stack for output in measured.unreached if (stack := stack_of(output)) not in reached
    )
    single = [output for output in measured.unreached if stack_of(output) in reached]
    if len(single) > 3:
        single[2:] = [f"{len(single) - 2} more"]
    return [f"no sample ran through {', '.join((*whole, *single))}: a merge averages it"]
