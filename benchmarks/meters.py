"""Time and memory of what runs inside this process."""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, else the clock is read too early."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass
class Timed:
    """Something that runs, and the seconds of its runs.

    Attributes:
        run: Runs once.
        most: How often it is run at most.
        share: What part of all tokens it runs on.
        wall: Seconds of every run.
        processor: The host's processor seconds of every run: other programs' work counts less in them.
        result: What the last run returned.
    """

    run: Callable[[], Any]
    most: int
    share: float = 1.0
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


def peak_bytes(device: torch.device, run: Callable[[], object]) -> dict[str, Any]:
    """Peak memory of a run in a process that runs nothing else, and how much was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return {"of": "device", "before": before, "peak": torch.cuda.max_memory_allocated(device)}
    with suppress(OSError):  # Linux only: forget the peak of loading. Elsewhere it stays in.
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    run()
    return {"of": "process", "before": before, "peak": peak_resident_bytes()}


def peak_resident_bytes() -> int:
    """The process's largest resident set."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
