"""Where a model runs, on how much at a time, and what it says when it cannot."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import torch

from fisher_mask_mergekit.batches import Limit, growing_limits
from fisher_mask_mergekit.errors import FisherMaskError, MeasurementError, RecipeError, first_line
from fisher_mask_mergekit.passes import Agree, is_out_of_memory
from fisher_mask_mergekit.settings import FisherSettings


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


_SHOWN = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
"""By kind of GPU, the environment variable that says which of the machine's a process sees."""


def own_device(name: str | None, place: int, here: int) -> torch.device:
    """The device of one of several processes: of GPUs, the one that has its number, or the only one
    that it is shown. None is touched.

    Args:
        name: As :func:`pick_device` takes it, but without a number.
        place: Which of the processes on its machine this is.
        here: How many of them there are.

    Raises:
        RecipeError: If it is none for several processes, not there, or there are fewer GPUs than processes.
    """
    try:
        asked = pick_device(None) if name is None else torch.device(name)
    except RuntimeError:
        return pick_device(name)  # It says what is wrong.
    if name is not None and asked.index is not None:
        raise RecipeError(
            f"device '{name}' is one for all processes; give --device {asked.type}, and each takes one of its own"
        )
    if name is not None and asked.type not in ("cpu", "cuda", "xpu"):
        raise RecipeError(
            f"several processes cannot measure on {asked.type}; give --device cpu, or start one process"
        )
    if asked.type not in ("cuda", "xpu"):
        return torch.device("cpu")
    gpus, wanted = getattr(torch, asked.type).device_count(), max(here, place + 1)
    if not gpus:
        return pick_device(name)
    if gpus == 1 and _SHOWN.get(asked.type) in os.environ:
        return torch.device(asked.type, 0)  # A scheduler that shows every process its own, say.
    if gpus < wanted:
        raise RecipeError(
            f"{wanted} processes were started on this machine, which has {gpus} GPU{'s' * (gpus > 1)}: start one for each "
            f"(torchrun --nproc-per-node {gpus} ..., or with one machine accelerate launch --num_processes {gpus} ...), "
            "or give --device cpu"
        )
    return torch.device(asked.type, place)


Spread = Literal["layers", "shards", "offload"]
"""How weights are spread: whole layers over the GPUs of one process; in parts over all processes, on their GPUs or, until
they are needed, in the processor's memory."""


@dataclass(frozen=True)
class Execution:
    """How samples run: it moves numbers in their rounding alone.

    Attributes:
        batch_tokens: Tokens per batch at most, padding included; None for as many as pay and fit.
        recompute: Whether layers run again in the backward pass instead of keeping their activations.
        spread: How the weights are spread over GPUs; None for whole in every process.
    """

    batch_tokens: int | None = None
    recompute: bool = False
    spread: Spread | None = None

    @property
    def is_in_parts(self) -> bool:
        """Whether every process has a part of each weight only, so that all must run alike."""
        return self.spread in ("shards", "offload")


PLAIN = Execution()


def check_options(settings: FisherSettings, execution: Execution) -> None:
    """Whether a measurement can run as it is asked to.

    Raises:
        RecipeError: If batches are told apart by their tokens where they are part of the definition, activations are
            to be computed again where every module's input is needed in its turn, gradients that may overflow are to be
            squared while the backward pass that gives them goes by, or weights are to be in parts where every process
            has a sum per weight, or where batches may differ in their number of samples.
    """
    if settings.estimator == "batch" and execution.batch_tokens is not None:
        raise RecipeError(
            "estimator 'batch' squares the gradients of batches of batch_size samples; it takes no --batch-tokens"
        )
    if settings.kind != "mask" and execution.recompute:
        raise RecipeError(f"kind '{settings.kind}' keeps what every module is given; it takes no --recompute")
    if execution.is_in_parts and settings.kind != "mask":
        raise RecipeError(
            f"kind '{settings.kind}' has sums for every weight in every process; it takes no --spread {execution.spread}"
        )
    if execution.is_in_parts and settings.estimator == "batch":
        raise RecipeError(
            f"estimator 'batch' may end with a smaller batch, which not all processes have; it takes no --spread {execution.spread}"
        )
    if settings.kind != "mask" and settings.dtype == "float16":
        raise RecipeError(
            f"kind '{settings.kind}' squares gradients before it is known whether a batch overflows; it takes no dtype "
            "float16: take bfloat16 or float32"
        )


def to_make_smaller(settings: FisherSettings) -> str:
    """What helps where memory lacks, of what :func:`check_options` lets pass."""
    size = "batch_size" if settings.estimator == "batch" else "--batch-tokens"
    return f"{size} or max_length" + (", --recompute" if settings.kind == "mask" else "")


def batch_limits(
    settings: FisherSettings,
    rows: int | None,
    tokens: int | None,
    device: torch.device,
    agree: Agree | None = None,
) -> Iterator[Limit]:
    """How much each batch of the pre-pass may hold.

    Args:
        settings: What is asked for.
        rows: Samples at most; None for any number.
        tokens: Tokens at most, padding included; None for as many as pay and fit.
        device: Where the batches run.
        agree: As :func:`~fisher_mask_mergekit.passes.run_samples` takes it.
    """
    if settings.estimator == "batch":
        return repeat(Limit(rows=rows))
    return growing_limits(device, rows, agree) if tokens is None else repeat(Limit(tokens, rows))


@contextmanager
def model_errors(name: str, kind: Any, smaller: str) -> Iterator[None]:
    """Turn what a model says of its inputs into one error.

    Args:
        name: The checkpoint.
        kind: Its class.
        smaller: What to make smaller where memory lacks.
    """
    try:
        yield
    except FisherMaskError:
        raise
    except Exception as error:  # Whatever the architecture's code raises.
        if is_out_of_memory(error):
            raise MeasurementError(
                f"the device has too little memory for {name}; take a smaller {smaller}, or dtype bfloat16"
            ) from error
        raise MeasurementError(
            f"{name} ({kind.__name__}) cannot be run on these samples: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
