"""What figures hang on besides the program: the machine, its load, the versions, and the day.

Loads nothing heavy, see ``processes.py``.
"""

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("fisher-mask-mergekit", "torch", "transformers", "mergekit", "numpy")
NAMES = (("(R)", ""), ("(TM)", ""), (" CPU", ""), (" Processor", ""))
"""What processors' names are shortened by."""


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def threads() -> int:
    """How many torch computes with, if nobody tells it otherwise."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """As it is now; call it before anything is measured, for the load to be that of others."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def hardware(found: Mapping[str, Any], device: str = "cpu") -> str:
    """What something ran on, in a few words.

    Args:
        found: By :func:`environment`.
        device: The accelerator's name, or ``cpu``.
    """
    if device != "cpu":
        return device
    name = found["processor"]
    for long, short in NAMES:
        name = name.replace(long, short)
    count = found["threads"]
    return f"{' '.join(name.split())}, {count} thread{'s' * (count != 1)}"


def heading(part: str, found: Mapping[str, Any], device: str = "cpu") -> str:
    """A table's title: what it is of, and all that its figures hang on."""
    torch, day = found["versions"]["torch"].partition("+")[0], found["date"][:16].replace("T", " ")
    return f"{part} ({hardware(found, device)}; torch {torch}; {day}; load before it {found['load_average'][0]:g})"


def file_name(*parts: str) -> str:
    """A file's name made of what it holds."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts if part)
