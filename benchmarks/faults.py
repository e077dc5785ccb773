"""Kill the commands at random, and crowd many of them on one cache: what is lost, torn or refused?

    python benchmarks/faults.py [--computes 200] [--merges 100] [--processes 16] [--seconds 300] [--json FILE]

Two tiny checkpoints have their sidecars in one shared cache. Every process is forked from one that has
imported everything, and runs the command itself. A kill is ``kill -9`` of one of up to three processes that run at once:
at any moment of its run, or, where something is measured, every other time of one alone that is writing it. After
each kill, everything in the cache must be whole and hold the very numbers of an undisturbed run, and be of the request
before or after, the other models' untouched; then the same command must succeed, and leave nothing half-written.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crowded import KINDS, MODELS, SEEDS, Child, Kind, Request, State, World, merge_digest, start


@dataclass
class Count:
    """What came of the kills.

    Attributes:
        kills: How many processes were killed before they ended.
        writing: How many of them while a file was being written.
        torn: Sidecars that cannot be read, or hold other numbers than an undisturbed run's.
        lost: Sidecars that were there and are not, or were replaced by nobody.
        failed: Processes that were not killed and ended with an error.
        left: Files half-written that were there after the next run.
        runs: How many processes ended by themselves.
        what: What was said of all that went wrong.
    """

    kills: int = 0
    writing: int = 0
    torn: int = 0
    lost: int = 0
    failed: int = 0
    left: int = 0
    runs: int = 0
    what: list[str] = field(default_factory=list)


def half_written(world: World) -> list[Path]:
    """Temporary files and locks in the cache."""
    return list(world.cache.rglob(".*"))


def is_writing(target: Path) -> bool:
    """Whether a file or folder that will be ``target`` is being written."""
    return any(target.parent.glob(f".{target.name}.{'?' * 8}"))


def after(seconds: float, running: Sequence[Any], chance: random.Random) -> Callable[[], bool]:
    """Whether a time is over that is drawn from how long so many processes may take that take so long by themselves."""
    until = time.perf_counter() + chance.uniform(0, seconds * len(running))
    return lambda: time.perf_counter() > until


def kill_one(
    children: Sequence[Child], when: Callable[[], bool], chance: random.Random, count: Count
) -> bool:
    """Kill one of several when it is time, unless it ends before; the others must end well. Whether it was killed."""
    victim = chance.choice(children)
    while not when() and victim.runs():
        time.sleep(0.0005)
    with suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGKILL)
    killed = False
    for child in children:
        code = child.end()
        if child is victim and code == -signal.SIGKILL:
            killed = True
        else:
            ended(child, code, count)
        child.log.unlink()
    count.kills += killed
    return killed


def ended(child: Child, code: int, count: Count) -> None:
    count.runs += 1
    if code != 0:
        count.failed += 1
        count.what.append(f"exit code {code}: {child.said()}")


def again(arguments: Sequence[str], count: Count) -> None:
    """What was killed, once more."""
    child = start(arguments)
    ended(child, child.end(), count)
    child.log.unlink()


def compare_states(world: World, before: State, allowed: Sequence[Request], count: Count) -> None:
    """Everything as it was, or as one of the requests makes it."""
    for (model, kind), now in world.state().items():
        fine = {before[model, kind], *(world.sidecars[one] for one in allowed if one[:2] == (model, kind))}
        if now not in fine:
            count.torn += now.startswith("torn")
            count.lost += not now.startswith("torn")
            count.what.append(f"{kind} of {model}: {now}")


def kill_computes(world: World, kills: int, chance: random.Random) -> Count:
    """Kill processes that measure what replaces an earlier sidecar, or the first one."""
    count = Count()
    while count.kills < kills:
        model, kind = chance.choice(MODELS), chance.choice(KINDS)
        target = world.target(model, kind)
        if chance.random() < 0.2:  # Without one before.
            shutil.rmtree(target) if kind == "diagonal" else target.unlink(missing_ok=True)
        before = world.state()
        seed = next((one for one in SEEDS if world.sidecars[model, kind, one] != before[model, kind]), 0)
        aimed = chance.random() < 0.5
        requests: list[Request] = [(model, kind, seed)] * (1 if aimed else chance.choice((1, 2, 3)))
        if len(requests) == 3:  # One that asks for something else, of the same model and for the same place.
            requests[2] = (model, kind, 1 - seed)
        children = [start(world.compute(one)) for one in requests]
        when = (
            partial(is_writing, target)
            if aimed
            else after(world.seconds[f"compute {kind}"], requests, chance)
        )
        count.writing += kill_one(children, when, chance, count) and aimed
        compare_states(world, before, requests, count)
        again(world.compute(requests[0]), count)
        compare_states(world, before | {(model, kind): world.sidecars[requests[0]]}, [], count)
        if left := half_written(world):
            count.left += len(left)
            count.what.append(f"left: {', '.join(map(str, left))}")
    return count


def kill_merges(world: World, kills: int, chance: random.Random) -> Count:
    """Kill merges, some beside another merge and a process that measures again what they read."""
    count = Count()
    for kind in KINDS:
        for model in MODELS:
            again(world.compute((model, kind, 0)), count)
    before = world.state()
    while count.kills < kills:
        kind = chance.choice(KINDS)
        out = world.folder / "out"
        commands = [world.merge(kind, out)]
        if chance.random() < 0.5:
            commands.append(world.merge(chance.choice(KINDS), world.folder / "other"))
        if chance.random() < 0.3:
            commands.append(world.compute((chance.choice(MODELS), kind, 0), "--force"))
        children = [start(one) for one in commands]
        kill_one(children, after(world.seconds[f"merge {kind}"], commands, chance), chance, count)
        compare_states(world, before, [], count)
        again(world.merge(kind, out), count)
        if merge_digest(out) != world.merged[kind]:
            count.torn += 1
            count.what.append(f"the merge by {kind} has other weights")
    return count


def crowd(world: World, processes: int, seconds: float, chance: random.Random) -> tuple[Count, int, int]:
    """Keep many processes at one cache busy, which is empty at first.

    Returns:
        What came of it; and what those that began together said of both models, how often measured, how often served.
    """
    count = Count()
    shutil.rmtree(world.cache)
    first = [start(["compute", str(world.recipe("mask"))]) for _ in range(processes)]
    measured = served = 0
    for child in first:
        ended(child, child.end(), count)
        said = child.log.read_text()
        measured += said.count(" s on cpu, ")
        served += said.count(", measured before, ")
    for kind in KINDS[1:]:
        for model in MODELS:
            again(world.compute((model, kind, 0)), count)
    until = time.perf_counter() + seconds
    busy: dict[int, tuple[Child, Path | None, Kind]] = {}
    while busy or time.perf_counter() < until:
        while len(busy) < processes and time.perf_counter() < until:
            child, out, kind = _anything(world, chance)
            busy[child.pid] = child, out, kind
        pid, status = os.waitpid(-1, 0)
        child, out, kind = busy.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        ended(child, code, count)
        child.log.unlink()
        if out is not None:
            if code == 0 and merge_digest(out) != world.merged[kind]:
                count.torn += 1
                count.what.append(f"the merge by {kind} has other weights")
            shutil.rmtree(out, ignore_errors=True)
    compare_states(
        world, dict.fromkeys(world.state(), ""), [one for one in world.sidecars if one[2] == 0], count
    )
    left = half_written(world)
    count.left += len(left)
    count.what += map(str, left)
    return count, measured, served


def _anything(world: World, chance: random.Random) -> tuple[Child, Path | None, Kind]:
    """One of what users do, and for a merge where it goes and of which kind it is."""
    kind, model = chance.choice(KINDS), chance.choice(MODELS)
    out = Path(tempfile.mkdtemp(dir=world.folder, prefix="out-"))
    match chance.choice(("compute", "force", "merge", "merge", "inspect", "check")):
        case "merge":
            return start(world.merge(kind, out)), out, kind
        case "compute":
            arguments = ["compute", str(world.recipe(kind))]
        case "force":
            arguments = world.compute((model, kind, 0), "--force")
        case "inspect":
            arguments = ["inspect", str(world.recipe("mask"))]
        case _:
            arguments = ["check", str(world.recipe(kind))]
    out.rmdir()
    return start(arguments), None, kind


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``faults.json``."""
    from fisher_mask_mergekit.evaluation.table import aligned

    crowd, versions = record["crowd"], record["versions"]
    columns = {
        "killed": "kills",
        "while writing": "writing",
        "torn, or other numbers": "torn",
        "lost": "lost",
        "half-written files left": "left",
        "others": "runs",
        "of them failed": "failed",
    }
    titles = {
        "compute": "`kill -9` of `mergekit-fisher compute`",
        "merges": "`kill -9` of `mergekit-yaml`",
        "crowd": f"{crowd['processes']} processes at one cache for {crowd['seconds']:g} s",
    }
    rows = [["", *columns]] + [
        [title, *(str(record[name][key]) for key in columns.values())] for name, title in titles.items()
    ]
    asked = ("processes", "models", "measured", "served")
    first = [["asking for the same at once: processes", *asked[1:]], [str(crowd[name]) for name in asked]]
    where = ", ".join(f"{name} {versions[name]}" for name in ("torch", "mergekit", "filelock", "python"))
    return {
        f"Kills and crowds ({record['system']}; {where})": aligned(rows),
        "The crowd's beginning, with an empty cache": aligned(first),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--computes", type=int, default=200, help="kills of compute [default: %(default)s]")
    parser.add_argument("--merges", type=int, default=100, help="kills of merges [default: %(default)s]")
    parser.add_argument("--processes", type=int, default=16, help="at one cache [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=300, help="for how long [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chance [default: %(default)s]")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    given = options()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        (folder / "tmp").mkdir()
        os.environ |= {
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "FISHER_MASK_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import torch

        torch.set_num_threads(1)  # Threads do not outlive a fork.
        for heavy in ("datasets", "mergekit.scripts.run_yaml", "fisher_mask_mergekit.prepass"):
            import_module(heavy)  # So that no child has to.
        from fisher_mask_mergekit import store

        # The progress bars' own lock is one for all forks: one killed in it would keep the others waiting for ever.
        bars = import_module("tqdm").tqdm
        bars.set_lock(threading.RLock())
        bars.monitor_interval = 0
        # Sidecars go into the cache, as for somebody who may not write beside the checkpoints.
        stack.enter_context(patch.object(store, "destination", store.cached))
        chance = random.Random(given.seed)
        world = World(folder)
        computes = kill_computes(world, given.computes, chance)
        merges = kill_merges(world, given.merges, chance)
        crowded, measured, served = crowd(world, given.processes, given.seconds, chance)
    record = {
        "compute": asdict(computes),
        "merges": asdict(merges),
        "crowd": asdict(crowded)
        | {
            "processes": given.processes,
            "seconds": given.seconds,
            "models": len(MODELS),
            "measured": measured,
            "served": served,
        },
        "seed": given.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()}, {os.cpu_count()} cores",
        "versions": {
            one: version(one) for one in ("filelock", "mergekit", "safetensors", "torch", "transformers")
        }
        | {"python": platform.python_version()},
    }
    if given.json:
        given.json.write_text(f"{json.dumps(record, indent=1)}\n")
    print(*markdown(record).values(), sep="\n\n")
    counts = (computes, merges, crowded)
    for one in counts:
        print(*one.what, sep="\n", end="\n" if one.what else "")
    if any(one.what for one in counts) or (measured, served) != (
        len(MODELS),
        (given.processes - 1) * len(MODELS),
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
