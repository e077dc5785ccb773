"""Whether a launcher (``accelerate launch``, ``torchrun``) started this process, and others like it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from fisher_mask_mergekit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from fisher_mask_mergekit.processes import Processes

# A cluster may set the others for whatever runs on it; the process's place on its machine is the launcher's to know.
_SET_BY_LAUNCHERS = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched(least: int = 2) -> bool:
    """Whether this is one of several processes that a launcher started.

    Args:
        least: How many are several.
    """
    count = os.environ.get("WORLD_SIZE", "")
    return count.isdecimal() and int(count) >= least and all(name in os.environ for name in _SET_BY_LAUNCHERS)


def is_first() -> bool:
    """Whether this process speaks for all, if a launcher started it."""
    return not is_launched() or os.environ["RANK"] == "0"


def spread_by_launcher() -> Literal["shards", "offload"] | None:
    """How the weights are to be spread if the launcher was told so: ``accelerate launch --use_fsdp``."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    return "offload" if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true" else "shards"


@contextmanager
def joined_processes(
    device: str | None, *, in_parts: bool
) -> Iterator[tuple["Processes", "torch.device"] | None]:
    """The launcher's processes, and where this one is to measure; None where it is alone.

    Args:
        device: As the user gave it.
        in_parts: Whether they have a part of the model each: then there must be a launcher, if of one process only.

    Raises:
        RecipeError: If there is none.
    """
    if not is_launched(least=1 if in_parts else 2):
        if in_parts:
            raise RecipeError(
                "--spread shards and offload take processes to spread over:  accelerate launch --num_processes N "
                "-m fisher_mask_mergekit compute ..."
            )
        yield None
        return
    from fisher_mask_mergekit.processes import joined

    place = int(os.environ["LOCAL_RANK"])
    with joined(device, place, int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))) as processes:
        yield processes
