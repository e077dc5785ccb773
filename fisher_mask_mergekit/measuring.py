"""Samples through a checkpoint's model, in one process or several: Fisher information, and nothing written."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit import measure_diagonal, measure_factored, measure_mask
from fisher_mask_mergekit.batches import batches_in_step, dealt, lacks_for_padding, padded_batches
from fisher_mask_mergekit.diagonal import DiagonalFisher
from fisher_mask_mergekit.encoding import EncodedSamples
from fisher_mask_mergekit.execution import (
    PLAIN,
    Execution,
    batch_limits,
    check_options,
    model_errors,
    to_make_smaller,
)
from fisher_mask_mergekit.factored import FactoredFisher
from fisher_mask_mergekit.fisher import MaskFisher
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.placing import placed
from fisher_mask_mergekit.processes import ALONE, Processes, contact_within
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch

AnyFisher = MaskFisher | FactoredFisher | DiagonalFisher


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` found.

    Attributes:
        fisher: The Fisher information.
        values: What a merge will know the checkpoint's tensors by, see :func:`~fisher_mask_mergekit.recognition.probe`.
        seconds: How long the measuring took.
        notes: What the user should know.
    """

    fisher: AnyFisher
    values: dict[str, Tensor]
    seconds: float
    notes: tuple[str, ...]


def measure(
    job: Job,
    inputs: Inputs,
    device: torch.device,
    execution: Execution = PLAIN,
    *,
    tally: Tally[Any] | None = None,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Batch, Tally[Any]], None] = lambda batch, tally: None,
    processes: Processes = ALONE,
) -> Measured:
    """Load a checkpoint and run samples through it, a share of them in every process; nothing is written.

    Args:
        job: What :func:`~fisher_mask_mergekit.job.prepare` found.
        inputs: Its samples, or some of them.
        device: Where to run.
        execution: How.
        tally: What was summed over the first of the samples before, in the order that batches have them.
        on_start: Called before the first batch with the number of samples that are to run.
        on_batch: Called after every batch, with what was summed up to there.
        processes: The run's; what they measured is added up in all of them.

    Raises:
        FisherMaskError: On bad input.
    """
    check_options(job.settings, execution)
    kind, settings = kind_of(job), job.settings
    rows, notes = settings.rows, []
    if lacking := lacks_for_padding(inputs.tokenizer):
        rows = 1
        notes.append(f"{job.checkpoint.name} has no {lacking}: measuring one sample at a time")
    if tally:
        tally.sums = {key: total.to(device) for key, total in tally.sums.items()}
    agree = processes.anywhere if execution.is_in_parts else None
    limits = batch_limits(settings, rows, execution.batch_tokens, device, agree)
    with (
        model_errors(job.checkpoint.name, job.model_class, to_make_smaller(settings)),
        contact_within(),
    ):
        model, values = placed(kind, job, inputs, device, execution, processes)
        share = share_of(job, inputs, processes)
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
                share,
                inputs.tokenizer,
                limits=limits,
                by_length=settings.estimator != "batch",
                device=device,
                skip=done,
            )
        fisher = kind.measure(
            job, model, batches,
            recompute=execution.recompute, tally=tally, on_batch=on_batch, settle=partial(processes.added, device=device), agree=agree,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    if fisher.one_by_one and rows != 1:
        notes.append(
            f"{job.checkpoint.name} does not give in a batch what it gives a sample by itself, or does not keep samples apart in it: "
            "measured one sample at a time"
        )
    return Measured(fisher, values, seconds, (*notes, *kind.notes(fisher)))


def share_of(job: Job, inputs: Inputs, processes: Processes) -> EncodedSamples:
    """The samples that this process measures: those of whole batches, where batches are part of the definition."""
    rows = job.settings.rows if job.settings.estimator == "batch" else None
    return dealt(inputs.encoded, processes.rank, processes.count, rows)


def kind_of(job: Job) -> Any:
    """The module that measures what is asked for."""
    return _KINDS[job.settings.kind]


_KINDS: Mapping[Kind, Any] = {
    "mask": measure_mask,
    "factored": measure_factored,
    "diagonal": measure_diagonal,
}
