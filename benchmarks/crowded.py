"""What `faults.py` runs commands on: checkpoints, their sidecars in one cache, and processes forked from this one.

Loads nothing heavy by itself.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from fisher_mask_mergekit.opening import AnySidecar

MODELS = ("one", "two")
SEEDS = (0, 1)
Kind = Literal["mask", "factored", "diagonal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
METHODS: dict[Kind, str] = {
    "mask": "fisher_mask",
    "factored": "fisher_mask\nparameters: {nodes: all}",
    "diagonal": "fisher_diagonal",
}
"""What a recipe says for each."""
Request = tuple[str, Kind, int]
"""Model, kind and seed of a measurement."""
State = dict[tuple[str, Kind], str]
"""By model and kind, the digest of the sidecar, ``none``, or what is wrong with it."""


class World:
    """Checkpoints, recipes, a cache, and what an undisturbed run gives.

    Attributes:
        folder: All of it.
        checkpoints: Their folder.
        cache: The shared one.
        sidecars: By request, the digest of its numbers.
        merged: By kind, the digest of the merge.
        seconds: By command, how long one takes by itself.
    """

    def __init__(self, folder: Path) -> None:
        from tests import tiny

        self.folder, self.checkpoints, self.cache = folder, folder / "checkpoints", folder / "cache"
        tiny.sibling(self.checkpoints / "two", tiny.checkpoint(self.checkpoints / "one"), seed=1)
        tiny.write_data(folder / "data.jsonl")
        for kind in KINDS:
            for seed in SEEDS:
                self._write_recipe(kind, seed)
        self.sidecars: dict[Request, str] = {}
        self.merged: dict[Kind, str] = {}
        self.seconds: dict[str, float] = {}
        self._undisturbed()

    def _write_recipe(self, kind: Kind, seed: int) -> None:
        models = "".join(
            f"  - {{model: '{self.checkpoints / name}', parameters: {{weight: 1.0}}}}\n" for name in MODELS
        )
        self.recipe(kind, seed).write_text(
            f"merge_method: {METHODS[kind]}\nbase_model: '{self.checkpoints / MODELS[0]}'\ndtype: float32\nmodels:\n{models}"
            f"fisher: {{data: '{self.folder / 'data.jsonl'}', samples: 12, seed: {seed}}}\n"
        )

    def recipe(self, kind: Kind, seed: int = 0) -> Path:
        """Of both models."""
        return self.folder / f"{kind}-{seed}.yml"

    def target(self, model: str, kind: Kind) -> Path:
        """A sidecar's place in the cache."""
        from fisher_mask_mergekit.checkpoint import Checkpoint
        from fisher_mask_mergekit.store import cached

        return cached(Checkpoint(str(self.checkpoints / model), self.checkpoints / model, None), kind)

    def compute(self, request: Request, *options: str) -> list[str]:
        """The command for a request."""
        model, kind, seed = request
        data = ["--data", str(self.folder / "data.jsonl"), "--samples", "12"]
        return [
            "compute",
            str(self.checkpoints / model),
            "--kind",
            kind,
            *data,
            "--seed",
            str(seed),
            *options,
        ]

    def merge(self, kind: Kind, out: Path) -> list[str]:
        """The command for a merge."""
        return ["merge", str(self.recipe(kind)), str(out)]

    def _undisturbed(self) -> None:
        """Run everything once by itself, the requests of seed 0 last, so that those are what is there."""
        for seed in reversed(SEEDS):
            for kind in KINDS:
                taken = []
                for model in MODELS:
                    taken.append(_timed(self.compute((model, kind, seed))))
                    self.sidecars[model, kind, seed] = digest(self.target(model, kind))
                self.seconds[f"compute {kind}"] = statistics.mean(taken)
        for kind in KINDS:
            out = self.folder / f"merged-{kind}"
            self.seconds[f"merge {kind}"] = _timed(self.merge(kind, out))
            self.merged[kind] = merge_digest(out)

    def state(self) -> State:
        """Of everything in the cache."""
        return {(model, kind): digest(self.target(model, kind)) for model in MODELS for kind in KINDS}


@dataclass(frozen=True)
class Child:
    """A command in a process of its own, and where its output goes."""

    arguments: Sequence[str]
    pid: int
    log: Path

    def runs(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> int:
        """Wait for it; its exit code, negative if it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        """What it was and what it printed."""
        return f"{' '.join(self.arguments)}: {self.log.read_text()[-800:]}"


def start(arguments: Sequence[str]) -> Child:
    """Run ``mergekit-fisher`` with these arguments, or ``mergekit-yaml`` where the first is ``merge``."""
    handle, name = tempfile.mkstemp(dir=os.environ["TMPDIR"], prefix="log-")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            _run(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:  # A traceback, which no command should end with.
            print(repr(error))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # Nothing of the parent's is to be cleaned up.
    os.close(handle)
    return Child(arguments, pid, Path(name))


def _run(arguments: Sequence[str]) -> None:
    if arguments[0] == "merge":
        from mergekit.scripts.run_yaml import main as command
    else:
        from fisher_mask_mergekit.cli import app as command
    command(list(arguments[arguments[0] == "merge" :]))


def _timed(arguments: Sequence[str]) -> float:
    started = time.perf_counter()
    child = start(arguments)
    if child.end() != 0:
        raise SystemExit(f"cannot even run undisturbed: {child.said()}")
    return time.perf_counter() - started


def digest(path: Path) -> str:
    """Of a sidecar's numbers and seed, read as a merge reads it; ``none``, or what is wrong with it."""
    from fisher_mask_mergekit.errors import SidecarError
    from fisher_mask_mergekit.opening import read_any

    if not path.exists():
        return "none"
    found = hashlib.sha256()
    try:
        sidecar = read_any(path)
        found.update(str(sidecar.metadata.settings.seed).encode())
        for tensor in numbers(sidecar):
            found.update(tensor.numpy().tobytes())
    except SidecarError as error:
        return f"torn: {error}"
    return found.hexdigest()


def numbers(sidecar: "AnySidecar") -> Iterator["Tensor"]:
    """All of a sidecar's, in an order of their own."""
    from fisher_mask_mergekit.diagonal_sidecar import DiagonalSidecar
    from fisher_mask_mergekit.factored_sidecar import FactoredSidecar

    if isinstance(sidecar, DiagonalSidecar):
        yield from map(sidecar.fisher, sidecar.metadata.tensors)
    elif isinstance(sidecar, FactoredSidecar):
        yield from (sidecar.packed[name] for name in sorted(sidecar.packed))
    else:
        yield from (vector for vectors in sidecar.fisher.values() for vector in vectors.values())


def merge_digest(out: Path) -> str:
    """Of a merge's weight files."""
    files = sorted(out.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
