"""The pre-pass and what it is compared with, timed or weighed inside one process.

    python benchmarks/passes.py {time,memory} CHECKPOINT DATA [--samples N] [--repeats N] [--device D] [--run NAME]

``speed.py`` runs this and prints the table; here a line of JSON is printed.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from fisher_mask_mergekit.batches import encode_samples, growing_limits, padded_batches
from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.diagonal import DiagonalFisher, diagonal_fisher
from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.factored import FactoredFisher, factored_fisher
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.settings import FisherSettings, Labels
from fisher_mask_mergekit.sites import NodeKey, Site
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.tasks import Batch, Categorical, Task, Tokenization, task_of

MOST_TOKENS = 512
SLOW_REPEATS = 2
"""What takes many times the pre-pass's time is repeated this often at most."""

FULL_FISHER_SAMPLES = 32
EXACT_FULL_FISHER_SAMPLES = 8


@dataclass(frozen=True)
class Workload:
    """A model, frozen and in evaluation mode, and what it is measured on."""

    model: nn.Module
    batches: list[Batch]
    sites: tuple[Site, ...]
    task: Task
    device: torch.device


def load_workload(checkpoint: Path, data: str, samples: int, device: torch.device) -> Workload:
    """The model and batches that ``mergekit-fisher compute`` would make of these, with its defaults."""
    settings = FisherSettings(data=data, samples=samples)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=getattr(torch, settings.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    longest = min(MOST_TOKENS, tokenizer.model_max_length, model.config.max_position_embeddings)
    task = task_of(model.config, str(checkpoint), settings)
    batches = padded_batches(
        encode_samples(load_samples(settings, task), task, Tokenization(tokenizer, longest)),
        tokenizer,
        limits=growing_limits(torch.device("cpu"), settings.rows),
        by_length=True,
        device=device,
    )
    sites = sites_of(model, tensor_shapes(locate(str(checkpoint))))
    model.eval().requires_grad_(False).to(device)
    return Workload(model, list(batches), sites, task, device)


def pre_pass(work: Workload) -> dict[NodeKey, Tensor]:
    """The thing itself."""
    return mask_fisher(work.model, work.batches, work.sites, work.task).fisher


def recompute(work: Workload) -> dict[NodeKey, Tensor]:
    """The same with activations computed again instead of kept."""
    return mask_fisher(work.model, work.batches, work.sites, work.task, recompute=True).fisher


def batch_gradients(work: Workload) -> dict[NodeKey, Tensor]:
    """The released code's estimator: one gradient per batch in place of one per sample."""
    return mask_fisher(work.model, work.batches, work.sites, work.task, estimator="batch").fisher


def diagonal(work: Workload, labels: Labels = "data") -> DiagonalFisher:
    """What ``compute --kind diagonal`` measures."""
    return diagonal_fisher(work.model, work.batches, work.task, labels=labels)


def factored(work: Workload) -> FactoredFisher:
    """What ``compute --kind factored`` measures."""
    return factored_fisher(work.model, work.batches, work.task)


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
    """The definition: masks that multiply the activations, one sample at a time, gradients by autograd."""
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
    count = 0
    for sample in single_samples(work.batches):
        loss = work.task.likelihood(work.model, sample).losses().sum()
        gradients = torch.autograd.grad(loss, list(masks.values()))
        for site, gradient in zip(work.sites, gradients, strict=True):
            wide = gradient.to(torch.float32 if work.device.type == "mps" else torch.float64)
            for node, (length,) in site.nodes().items():
                square = wide.unflatten(0, (length, -1)).sum(-1).square()
                sums[site.output, node] = sums.get((site.output, node), 0) + square
        count += 1
    for handle in handles:
        handle.remove()
    return {key: total / count for key, total in sums.items()}


def full_fisher(work: Workload, samples: list[Batch], *, exact: bool) -> list[Tensor]:
    """Diagonal Fisher information of every weight, one sample at a time.

    With ``exact``, the expectation over labels of arXiv 2111.09832, else the data's labels.
    """
    work.model.requires_grad_(True)
    parameters = list(work.model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for sample in samples:
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
    return [total / len(samples) for total in sums]


def log_probabilities(work: Workload, batch: Batch) -> Tensor:
    """Of every label, ``[B, C]``."""
    likelihood = work.task.likelihood(work.model, batch)
    assert isinstance(likelihood, Categorical)
    return likelihood.log_probs


def single_samples(batches: list[Batch]) -> Iterator[Batch]:
    """Every sample as a batch of one, without padding: one at a time there is nothing to pad to."""
    for batch in batches:
        width = batch.inputs["input_ids"].shape[1]
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            inputs = {
                name: tensor[row : row + 1, :length]
                if tensor.shape[1:2] == (width,)
                else tensor[row : row + 1]
                for name, tensor in batch.inputs.items()
            }
            yield Batch(inputs, batch.labels[row : row + 1], batch.index[row : row + 1])


def spread_out(samples: list[Batch], count: int) -> list[Batch]:
    """A few of the samples, evenly over the order they are in, which is that of their length."""
    count = min(count, len(samples))
    return [samples[int((place + 0.5) * len(samples) / count)] for place in range(count)]


RUNS: Mapping[str, Callable[[Workload], object]] = {
    "pre_pass": pre_pass,
    "recompute": recompute,
    "lower_bound": lower_bound,
    "factored": factored,
    "diagonal": diagonal,
}
"""What is weighed."""


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, else the clock is read too early."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@dataclass
class Timed:
    """A way of measuring, the seconds of its runs, and what the last one gave.

    Attributes:
        run: Measures once.
        most: How often it is run at most.
        wall: Seconds of every run.
        processor: The host's processor seconds of every run: other programs' work counts less in them.
        result: What the last run returned.
    """

    run: Callable[[], Any]
    most: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    result: Any = None

    def once(self, device: torch.device) -> None:
        """Run it by the clock."""
        synchronise(device)
        wall, processor = time.perf_counter(), time.process_time()
        self.result = self.run()
        synchronise(device)
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def time_ways(work: Workload, singles: list[Batch], repeats: int) -> dict[str, Timed]:
    """Every repeat runs all ways in turn, so that a ratio compares neighbours in time."""
    few, fewer = spread_out(singles, FULL_FISHER_SAMPLES), spread_out(singles, EXACT_FULL_FISHER_SAMPLES)
    ways = {
        "pre_pass": Timed(partial(pre_pass, work), repeats),
        "lower_bound": Timed(partial(lower_bound, work), repeats),
        "factored": Timed(partial(factored, work), repeats),
        "recompute": Timed(partial(recompute, work), repeats),
        "batch_gradients": Timed(partial(batch_gradients, work), repeats),
        "explicit_masks": Timed(partial(explicit_masks, work), SLOW_REPEATS),
        "diagonal": Timed(partial(diagonal, work), SLOW_REPEATS),
        "exact_diagonal": Timed(partial(diagonal, work, "exact"), SLOW_REPEATS),
        "full_fisher": Timed(partial(full_fisher, work, few, exact=False), SLOW_REPEATS),
        "exact_full_fisher": Timed(partial(full_fisher, work, fewer, exact=True), SLOW_REPEATS),
    }
    for repeat in range(repeats):
        # Who runs second may find warmer caches, or a busier machine: they take turns.
        for way in list(ways.values())[:: -1 if repeat % 2 else 1]:
            if repeat < way.most:
                way.once(work.device)
    return ways


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
    singles = list(single_samples(work.batches))
    ways = time_ways(work, singles, repeats)
    return {
        "seconds": {name: {"wall": way.wall, "processor": way.processor} for name, way in ways.items()},
        "disagreement": disagreement(ways["pre_pass"].result, ways["explicit_masks"].result),
        "samples": len(singles),
        "full_fisher_samples": min(FULL_FISHER_SAMPLES, len(singles)),
        "exact_full_fisher_samples": min(EXACT_FULL_FISHER_SAMPLES, len(singles)),
        "labels": log_probabilities(work, singles[0]).shape[1],
        "batches": [list(batch.inputs["input_ids"].shape) for batch in work.batches],
        "tokens": sum(int(batch.inputs["attention_mask"].sum()) for batch in work.batches),
        "padded_tokens": sum(batch.inputs["input_ids"].numel() for batch in work.batches),
        "model": type(work.model).__name__,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "sites": len(work.sites),
        "dtype": str(next(work.model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else work.device.type,
        "versions": {name: version(name) for name in ("torch", "transformers", "mergekit", "numpy")},
    }


def peak_bytes(work: Workload, run: Callable[[], object]) -> dict[str, Any]:
    """Peak memory of a run in a process that runs nothing else, and how much was in use before it."""
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
        before = torch.cuda.memory_allocated(work.device)
        run()
        synchronise(work.device)
        return {"of": "device", "before": before, "peak": torch.cuda.max_memory_allocated(work.device)}
    with suppress(OSError):  # Linux only: forget the peak of loading. Elsewhere it stays in.
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    run()
    return {"of": "process", "before": before, "peak": peak_resident_bytes()}


def peak_resident_bytes() -> int:
    """The process's largest resident set."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


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
        print(json.dumps(peak_bytes(work, partial(RUNS[options.run], work))))


if __name__ == "__main__":
    main()
