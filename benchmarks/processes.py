"""What the benchmark measures from outside: processes of their own, their time and their peak memory.

Loads nothing heavy, and must not: a child's peak memory begins with its parent's.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# What the command mergekit-yaml runs; prints how long it took once everything was imported. Python's garbage
# collections are left out of that: whether the long one falls before or after the imports is chance.
MERGE = """
import gc, sys, time
from mergekit.scripts.run_yaml import main
collecting = 0.0
def watch(phase, info):
    global collecting
    collecting += time.perf_counter() if phase == "stop" else -time.perf_counter()
gc.callbacks.append(watch)
started = time.perf_counter()
main(sys.argv[1:], standalone_mode=False)
print(time.perf_counter() - started - collecting)
"""

# Prints the milliseconds of the import; of torch's search for entry points; and, where the import did not
# do it, of loading and calling the plug-in's.
IMPORT = """
import json, time
from importlib.metadata import entry_points
started = time.perf_counter()
import torch
imported = time.perf_counter()
found = entry_points(group="torch.backends")
searched = time.perf_counter()
for point in found:
    if point.value.startswith("fisher_mask_mergekit"):
        point.load()()
called = time.perf_counter()
print(json.dumps([1e3 * (imported - started), 1e3 * (searched - imported), 1e3 * (called - searched)]))
"""

# What the command mergekit-fisher runs.
COMMAND = "import sys; sys.argv[0] = 'mergekit-fisher'; from fisher_mask_mergekit.cli import main; main()"

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Lets glibc give back at once what is freed: a resident set is then what is in use, and no gaps between."""

WAYS = {"nodes_all": "fisher_mask\nparameters: {nodes: all}"}
"""Of what is merged by beside the methods as they are: the method, and what it is given."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well.

    Attributes:
        last_line: The last it printed.
        seconds: Wall time.
        processor: Processor seconds, its own and the system's for it; other programs' work counts less in them.
        peak: Its largest resident set, in bytes.
    """

    last_line: str
    seconds: float
    processor: float
    peak: int


def run_python(arguments: Sequence[str], **environment: str) -> Finished:
    """Run Python with these arguments; end with what it complained of if it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # The network's answers are not to be measured.
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        ) as child:
            assert child.stdout is not None
            output = child.stdout.read()
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"python {' '.join(arguments)} failed:\n{errors.read()[-4000:]}")
    last_line = (output.strip().splitlines() or [""])[-1]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Finished(last_line, seconds, usage.ru_utime + usage.ru_stime, peak)


def run_script(name: str, *arguments: object, **environment: str) -> Any:
    """What a script beside this one found."""
    return json.loads(run_python([str(HERE / name), *map(str, arguments)], **environment).last_line)


def taking_turns(names: Sequence[str], rounds: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Every name once a round, first and last by turns: noise that comes and goes hits all alike."""
    for number in rounds:
        for name in names[:: -1 if number % 2 else 1]:
            yield number, name


def memory_runs(arguments: Sequence[object], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Peak memory of the pre-pass, of its lower bound, of kind factored and, once, of the full diagonal, in bytes, see ``passes.py``."""
    names = ("pre_pass", "recompute", "lower_bound", "factored")
    order = ["diagonal", *(name for _, name in taking_turns(names, range(repeats)))]
    with ThreadPoolExecutor(2) as pool:  # Nothing is timed here, and memory does not mind a neighbour.
        found = list(
            pool.map(lambda name: run_script("passes.py", "memory", *arguments, "--run", name), order)
        )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in order}
    for name, one in zip(order, found, strict=True):
        runs[name].append(one)
    return runs


def merge_runs(
    checkpoints: Sequence[str], work: Path, repeats: int, methods: Sequence[str], *, warm: bool
) -> dict[str, dict[str, list[float]]]:
    """``mergekit-yaml`` on all checkpoints: seconds, processor seconds, seconds once imported, peak bytes.

    By these methods, or :data:`WAYS`, and by ``linear``, which is run as in a mergekit without the plug-in. If not ``warm``, each runs once
    before, so that the files are in the cache.
    """
    runs: dict[str, dict[str, list[float]]] = {}
    for method in (*methods, "linear"):
        models = [f"  - model: {checkpoint}\n    parameters: {{weight: 1}}\n" for checkpoint in checkpoints]
        recipe = f"merge_method: {WAYS.get(method, method)}\nmodels:\n{''.join(models)}"
        (work / f"{method}.yml").write_text(recipe)
        runs[method] = {"seconds": [], "processor": [], "seconds_once_imported": [], "peak": []}
    for number, method in taking_turns(list(runs), range(0 if warm else -1, repeats)):
        out = work / "merged"
        finished = run_python(
            ["-P", "-c", MERGE, str(work / f"{method}.yml"), str(out)],
            TORCH_DEVICE_BACKEND_AUTOLOAD="0" if method == "linear" else "1",
        )
        shutil.rmtree(out)
        if number >= 0:
            runs[method]["seconds"].append(finished.seconds)
            runs[method]["processor"].append(finished.processor)
            runs[method]["seconds_once_imported"].append(float(finished.last_line))
            runs[method]["peak"].append(float(finished.peak))
    return runs


def help_runs(count: int) -> dict[str, list[float]]:
    """``mergekit-fisher --help``: seconds and processor seconds."""
    run_python(["-P", "-c", COMMAND, "--help"], PYTHONDONTWRITEBYTECODE="")
    finished = [run_python(["-P", "-c", COMMAND, "--help"]) for _ in range(count)]
    return {
        "seconds": [one.seconds for one in finished],
        "processor": [one.processor for one in finished],
    }


def import_runs(count: int) -> dict[str, list[list[float]]]:
    """Milliseconds that :data:`IMPORT` prints, with torch's plug-ins ``on`` and ``off``."""
    runs: dict[str, list[list[float]]] = {"on": [], "off": []}
    # Installing a package compiles it. A checkout is compiled when first imported, if that is allowed.
    compiled = {"PYTHONDONTWRITEBYTECODE": ""}
    run_python(["-P", "-c", IMPORT], **compiled)
    for _, plugins in taking_turns(list(runs), range(count)):
        switch = "1" if plugins == "on" else "0"
        finished = run_python(["-P", "-c", IMPORT], TORCH_DEVICE_BACKEND_AUTOLOAD=switch, **compiled)
        runs[plugins].append(json.loads(finished.last_line))
    return runs
