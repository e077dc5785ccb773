"""A checkpoint's model where it is to run: whole on a device, layer by layer on several, or in parts in every process."""

from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.execution import Execution
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.loading import bare_model
from fisher_mask_mergekit.processes import Processes
from fisher_mask_mergekit.sharded import shard
from fisher_mask_mergekit.skeleton import sites_in


def placed(
    kind: Any,
    job: Job,
    inputs: Inputs,
    device: torch.device,
    execution: Execution,
    processes: Processes,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Load a checkpoint, check what is known of it, and put it where it is to run.

    Args:
        kind: The module that measures what is asked for.
        job: What is measured.
        inputs: On what.
        device: Where this process runs it; with ``layers``, where its first layer is.
        execution: How.
        processes: The run's.

    Returns:
        The model, and the values that a merge will know its tensors by; where it is in parts, the first process alone
        loads it, and has those.
    """
    if not execution.is_in_parts:
        model, values = kind.load(job, inputs, in_layers=execution.spread == "layers")
        model = model if execution.spread else model.to(device)
        kind.check(job, inputs, model, device)
        return model, values
    whole, values = None, {}
    if processes.is_first:
        whole, values = kind.load(job, inputs)
        kind.check(job, inputs, whole, torch.device("cpu"))
    bare = bare_model(job.model_class, job.config, inputs.tokenizer, getattr(torch, job.settings.dtype))
    return shard(
        whole, bare, sites_in(bare), processes, device, offload=execution.spread == "offload"
    ), values
