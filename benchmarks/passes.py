"""The pre-pass and what it is compared with, timed or weighed inside one process.

    python benchmarks/passes.py {time,memory} CHECKPOINT DATA [--samples N] [--repeats N] [--device D] [--run NAME]

``speed.py`` runs this and prints the table; here a line of JSON is printed.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from meters import Timed, device_name, peak_bytes
from torch import Tensor, nn
from transformers.utils import logging
from workload import Workload, load_workload

from fisher_mask_mergekit.diagonal import DiagonalFisher, diagonal_fisher
from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.factored import FactoredFisher, factored_fisher
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.sites import NodeKey
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch, Categorical

SLOW_REPEATS = 2
"""What takes many times the pre-pass's time is repeated this often at most."""

FEW, FEWER = 32, 8
"""Samples that a processor does what takes long with; a GPU, which has the time for it, does all."""


def pre_pass(work: Workload) -> dict[NodeKey, Tensor]:
    """The thing itself."""
    return mask_fisher(work.model, work.batches, work.sites, work.task).fisher


def unchecked(work: Workload) -> dict[NodeKey, Tensor]:
    """The same without its look for samples that do not lie apart: that of the first batches, which counts once."""
    checked = Tally[NodeKey](checked=sum(len(batch.index) for batch in work.batches), checked_padded=True)
    return mask_fisher(work.model, work.batches, work.sites, work.task, tally=checked).fisher


def recompute(work: Workload) -> dict[NodeKey, Tensor]:
    """The same with activations computed again instead of kept."""
    return mask_fisher(work.model, work.batches, work.sites, work.task, recompute=True).fisher


def batch_gradients(work: Workload) -> dict[NodeKey, Tensor]:
    """The released code's estimator: one gradient per batch in place of one per sample."""
    return mask_fisher(work.model, work.batches, work.sites, work.task, estimator="batch").fisher


def diagonal(work: Workload, labels: Labels = "data") -> DiagonalFisher:
    """What ``compute --kind diagonal`` measures."""
    return diagonal_fisher(work.model, work.batches, work.task, labels=labels)


def factored(work: Workload, *, by_token: bool = False) -> FactoredFisher:
    """What ``compute --kind factored`` measures."""
    return factored_fisher(work.model, work.batches, work.task, by_token=by_token)


def lower_bound(work: Workload) -> None:
    """Forward, and backward to the first site's input, of every batch, and nothing besides.

    No weight gets a gradient. No way of measuring by one backward pass can be faster.
    """

    def start(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])

    with work.model.get_submodule(work.sites[0].output).register_forward_pre_hook(start):
        for batch in work.batches:
            work.task.likelihood(work.model, batch).losses().sum().backward()


def explicit_masks(work: Workload) -> dict[NodeKey, Tensor]:
    """The definition: masks that multiply the activations of samples that come one at a time, gradients by autograd."""
    masks = {
        site.output: torch.ones(site.neurons or site.heads, device=work.device, requires_grad=True)
        for site in work.sites
    }

    def multiply(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)), *args[1:])

    handles = [
        work.model.get_submodule(output).register_forward_pre_hook(partial(multiply, mask))
        for output, mask in masks.items()
    ]
    sums: dict[NodeKey, Any] = {}
    for sample in work.batches:
        loss = work.task.likelihood(work.model, sample).losses().sum()
        gradients = torch.autograd.grad(loss, list(masks.values()))
        for site, gradient in zip(work.sites, gradients, strict=True):
            wide = gradient.to(torch.float32 if work.device.type == "mps" else torch.float64)
            for node, (length,) in site.nodes().items():
                square = wide.unflatten(0, (length, -1)).sum(-1).square()
                sums[site.output, node] = sums.get((site.output, node), 0) + square
    for handle in handles:
        handle.remove()
    return {key: total / len(work.batches) for key, total in sums.items()}


def full_fisher(work: Workload, *, exact: bool) -> list[Tensor]:
    """Diagonal Fisher information of every weight, of samples that come one at a time.

    With ``exact``, the expectation over labels of arXiv 2111.09832, else the data's labels.
    """
    work.model.requires_grad_(True)
    parameters = list(work.model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for sample in work.batches:
        log_probs = log_probabilities(work, sample)[0]
        labels = list(range(len(log_probs))) if exact else [int(sample.labels[0])]
        for label in labels:
            weight = float(log_probs[label].detach().exp()) if exact else 1.0
            gradients = torch.autograd.grad(
                log_probs[label], parameters, retain_graph=label != labels[-1], allow_unused=True
            )
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=weight)
    work.model.requires_grad_(False)
    return [total / len(work.batches) for total in sums]


def log_probabilities(work: Workload, batch: Batch) -> Tensor:
    """Of every label, ``[B, C]``."""
    likelihood = work.task.likelihood(work.model, batch)
    assert isinstance(likelihood, Categorical)
    return likelihood.log_probs


RUNS: Mapping[str, Callable[[Workload], object]] = {
    "pre_pass": pre_pass,
    "recompute": recompute,
    "lower_bound": lower_bound,
    "factored": factored,
    "diagonal": diagonal,
}
"""What is weighed."""


def time_ways(work: Workload, repeats: int) -> dict[str, Timed]:
    """Every repeat runs all ways in turn, so that a ratio compares neighbours in time."""
    on_cpu = work.device.type == "cpu"
    few = work.one_batch(FEW) if on_cpu else work
    singles = work.one_by_one()
    some = singles.spread_out(FEW) if on_cpu else singles
    fewer = singles.spread_out(FEWER) if on_cpu else singles
    ways = {
        "pre_pass": Timed(partial(pre_pass, work), repeats),
        "lower_bound": Timed(partial(lower_bound, work), repeats),
        "unchecked": Timed(partial(unchecked, work), repeats),
        "factored": Timed(partial(factored, work), repeats),
        "by_token": Timed(partial(factored, work, by_token=True), repeats),
        "recompute": Timed(partial(recompute, work), repeats),
        "batch_gradients": Timed(partial(batch_gradients, work), repeats),
        "explicit_masks": Timed(partial(explicit_masks, few.one_by_one()), SLOW_REPEATS, _share(few, work)),
        "diagonal": Timed(partial(diagonal, few), SLOW_REPEATS, _share(few, work)),
        "exact_diagonal": Timed(partial(diagonal, few, "exact"), SLOW_REPEATS, _share(few, work)),
        "full_fisher": Timed(partial(full_fisher, some, exact=False), SLOW_REPEATS, _share(some, work)),
        "exact_full_fisher": Timed(
            partial(full_fisher, fewer, exact=True), SLOW_REPEATS, _share(fewer, work)
        ),
    }
    for repeat in range(repeats):
        # Who runs second may find warmer caches, or a busier machine: they take turns.
        for way in list(ways.values())[:: -1 if repeat % 2 else 1]:
            if repeat < way.most:
                way.once(work.device)
    ways["explicit_masks"].result = disagreement(pre_pass(few), ways["explicit_masks"].result)
    return ways


def _share(some: Workload, work: Workload) -> float:
    return some.tokens / work.tokens


def disagreement(got: dict[NodeKey, Tensor], wanted: dict[NodeKey, Tensor]) -> float:
    """Largest difference, relative to the largest value of the same vector."""
    if got.keys() != wanted.keys():
        raise ValueError("the two ways do not measure the same mask nodes")
    return max(float((got[key] - wanted[key]).abs().max() / wanted[key].max()) for key in wanted)


def time_all(work: Workload, repeats: int) -> dict[str, Any]:
    """Everything that is timed, and on what."""
    warm = replace(work, batches=work.batches[:1])
    pre_pass(warm)
    lower_bound(warm)
    factored(warm)
    ways = time_ways(work, repeats)
    return {
        "seconds": {
            name: {"wall": way.wall, "processor": way.processor, "share": way.share}
            for name, way in ways.items()
        },
        "disagreement": ways["explicit_masks"].result,
        "samples": sum(len(batch.index) for batch in work.batches),
        "labels": log_probabilities(work, work.batches[0]).shape[1],
        "batches": [list(batch.inputs["input_ids"].shape) for batch in work.batches],
        "tokens": work.tokens,
        "padded_tokens": sum(batch.inputs["input_ids"].numel() for batch in work.batches),
        "model": type(work.model).__name__,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "sites": len(work.sites),
        "dtype": str(next(work.model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": device_name(work.device),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", choices=tuple(RUNS), default="pre_pass")
    options = parser.parse_args()
    logging.disable_progress_bar()
    device = pick_device(None if options.device == "auto" else options.device)
    work = load_workload(options.checkpoint, options.data, options.samples, device)
    if options.what == "time":
        print(json.dumps(time_all(work, options.repeats)))
    else:
        print(json.dumps(peak_bytes(device, partial(RUNS[options.run], work))))


if __name__ == "__main__":
    main()
