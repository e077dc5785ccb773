"""Whether a launcher (``accelerate launch``, ``torchrun``) started this process, and others like it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fisher_mask_mergekit.processes import Processes

# A cluster may set the others for whatever runs on it; the process's place on its machine is the launcher's to know.
_SET_BY_LAUNCHERS = ("LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Whether this is one of several processes that a launcher started."""
    count = os.environ.get("WORLD_SIZE", "")
    return count.isdecimal() and int(count) > 1 and all(name in os.environ for name in _SET_BY_LAUNCHERS)


def is_first() -> bool:
    """Whether this process speaks for all, if a launcher started it."""
    return not is_launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_processes(device: str | None) -> Iterator[tuple["Processes", "torch.device"] | None]:
    """The launcher's processes, and where this one is to measure; None where it is alone."""
    if not is_launched():
        yield None
        return
    from fisher_mask_mergekit.processes import joined

    with joined(device) as processes:
        yield processes
