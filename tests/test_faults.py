"""Many processes at once, a full disk, a checkpoint that changes: a whole sidecar or the one before, and a message."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import get_args

import pytest
import torch

from fisher_mask_mergekit import adapter, prepass, store
from fisher_mask_mergekit.checkpoint import Checkpoint, locate
from fisher_mask_mergekit.cli import compute as command
from fisher_mask_mergekit.errors import CheckpointError, SidecarError
from fisher_mask_mergekit.job import Job, prepare
from fisher_mask_mergekit.opening import read_any
from fisher_mask_mergekit.settings import FisherSettings, Kind
from fisher_mask_mergekit.store import alone, replace_folder
from tests import fake_hub, tiny
from tests.benchmarks import BENCHMARKS, benchmark
from tests.test_cli import run

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = get_args(Kind)
PATIENCE = 60
"""Seconds after which something that must happen is given up."""


def job_of(model: Path, data: Path, kind: Kind = "mask", seed: int = 0, force: bool = False) -> Job:
    return prepare(str(model), FisherSettings(data=str(data), samples=6, kind=kind, seed=seed), force=force)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def seed_of(path: Path) -> int:
    return read_any(path).metadata.settings.seed


def test_one_at_a_time_though_the_lock_file_comes_and_goes(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "x", [], []

    def enter() -> None:
        for _ in range(20):
            with alone(path, lambda: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert most == [1] * 120
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_neither_a_lock_nor_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    holder = (
        "import sys, tempfile; from pathlib import Path; from fisher_mask_mergekit.store import alone\n"
        "path = Path(sys.argv[1])\n"
        "with alone(path):\n"
        "    tempfile.mkdtemp(dir=path.parent, prefix='.x.')\n"
        "    tempfile.mkstemp(dir=path.parent, prefix='.x.')\n"
        "    print('holds it', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        with pytest.raises(BlockingIOError, match="another process is writing it"), alone(path):
            pass
        process.kill()
        process.wait()
    kept = [tmp_path / name for name in (".x.short", ".xy.12345678", ".x.123456789", "x.12345678")]
    for file in kept:
        file.touch()
    assert len(list(tmp_path.iterdir())) == 4 + 3
    with alone(path):
        pass
    assert set(tmp_path.iterdir()) == set(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_process_measured_meanwhile_is_served(model: Path, data: Path, kind: Kind) -> None:
    jobs = [job_of(model, data, kind) for _ in range(2)]
    anew = job_of(model, data, kind, force=True)
    other = job_of(model, data, kind, seed=1)
    done = [prepass.compute(job, CPU) for job in jobs]
    assert [one.served for one in done] == [False, True]
    assert done[0].path == done[1].path
    assert not prepass.compute(anew, CPU).served
    assert not prepass.compute(other, CPU).served
    # Of the same request, but for rows that changed since.
    stale = job_of(model, data, kind)
    tiny.write_data(data, seed=1)
    assert not prepass.compute(job_of(model, data, kind), CPU).served
    assert not prepass.compute(stale, CPU).served


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_tidied_up_too(model: Path, data: Path, kind: Kind) -> None:
    path = prepass.compute(job_of(model, data, kind), CPU).path
    whole = set(model.rglob("*"))
    # Killed between the rename and what comes after it: an earlier sidecar, and a lock.
    shutil.copytree(path.parent, path.with_name(f".{path.name}.12345678"))
    path.with_name(f".{path.name}.lock").touch()
    assert set(model.rglob("*")) > whole
    assert prepass.compute(job_of(model, data, kind), CPU).served
    assert set(model.rglob("*")) == whole


def test_a_process_that_waits_says_so_once(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    waits = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    monkeypatch.setattr(sys.modules[command.__module__], "say", say)
    target = model / store.BESIDE
    outputs: list[str] = []

    def measure() -> None:
        outputs.append(run("compute", model, "--data", data, "--samples", "6").stdout)

    job = job_of(model, data)
    with alone(target):
        thread = threading.Thread(target=measure)
        thread.start()
        assert waits.wait(PATIENCE)
        # Of the process that has the lock.
        monkeypatch.setattr(store, "alone", open_to_all)
        prepass.compute(job, CPU)
    thread.join(PATIENCE)
    assert [text for text in said if "accuracy" not in text] == [
        f"{model}: waiting for another process that measures into {target}"
    ]
    assert "measured before" in outputs[0]


@contextmanager
def open_to_all(*arguments: object) -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_changes_while_it_is_measured(
    model: Path, data: Path, kind: Kind, file: str
) -> None:
    prepass.compute(job_of(model, data, kind), CPU)
    before = contents(model / "fisher")

    def change(batch: object) -> None:
        os.utime(model / file, ns=(0, 0))

    with pytest.raises(
        CheckpointError, match=rf"changed while it was measured \({file}\); nothing was written"
    ):
        prepass.compute(job_of(model, data, kind, seed=1), CPU, on_batch=change)
    assert contents(model / "fisher") == before
    assert not prepass.compute(job_of(model, data, kind, seed=1), CPU).served


def test_a_folder_takes_anothers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        return tmp_path / name

    old = tmp_path / "old"
    replace_folder(make("first"), old)
    assert [(path.name, (path / "file").read_text()) for path in tmp_path.iterdir()] == [("old", "first")]
    new = make("new")
    replace_folder(new, old)
    assert ((old / "file").read_text(), (new / "file").read_text()) == ("new", "first")
    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    replace_folder(new, old)
    assert ((old / "file").read_text(), (new / "file").read_text()) == ("first", "new")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "none", old)
    assert (old / "file").read_text() == "first"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes two renames")
def test_there_is_no_moment_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(Path, "replace", None)
    replace_folder(tmp_path / "new", tmp_path / "old")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk: no file may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_written_whole_leaves_the_earlier_one(
    model: Path, data: Path, kind: Kind
) -> None:
    prepass.compute(job_of(model, data, kind), CPU)
    before = contents(model)
    job = job_of(model, data, kind, seed=1)
    with (
        largest_file(2000),
        pytest.raises(SidecarError, match=r"cannot write .*File too large.*; nothing was written"),
    ):
        prepass.compute(job, CPU)
    assert contents(model) == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_and_a_read_only_one(
    model: Path, data: Path, disk: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHER_MASK_CACHE", str(disk))
    monkeypatch.setattr(store, "destination", store.cached)
    asked = ("compute", model, "--data", data, "--samples", "6", "--kind", kind)
    run(*asked)
    before = contents(disk)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 21))
    said = run(*asked, "--seed", "1", code=1).stderr.splitlines()[-1]
    assert said.startswith("SidecarError: cannot write ")
    assert "No space left on device" in said
    assert said.endswith("; nothing was written")
    filler.unlink()
    assert contents(disk) == before
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "measured before" in run(*asked).stdout
    said = run(*asked, "--seed", "1", code=1).stderr
    assert "Read-only file system; nothing was measured" in said
    assert contents(disk) == before
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    run(*asked, "--seed", "1")
    (kept,) = [
        path for path in before if path.suffix in (".json", ".safetensors") and "index" not in path.name
    ][:1]
    assert seed_of(kept.parent if kind == "diagonal" else kept) == 1


def test_a_file_system_without_locks_is_said_before_anything_is_measured(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    job = job_of(model, data)  # The data's library has locks of its own.
    monkeypatch.setattr("fcntl.flock", no_locks)
    started: list[int] = []
    with pytest.raises(SidecarError, match=r"cannot write .*: No locks available; nothing was measured"):
        prepass.compute(job, CPU, on_start=started.append)
    assert not started


class Cut(fake_hub._Handler):
    """A network that breaks in the middle of the weights."""

    def end_headers(self) -> None:
        super().end_headers()
        if self.command == "GET" and self.path.endswith("model.safetensors"):
            self.wfile.write(bytes(1000))
            self.wfile, self.close_connection = BytesIO(), True


def test_a_network_that_breaks_during_a_download(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = fake_hub.Hub()
    hub.push("models/org/bert", model)
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    def located(handler: type[fake_hub._Handler]) -> Checkpoint:
        monkeypatch.setattr(fake_hub, "_Handler", handler)
        with fake_hub.serve(hub) as endpoint:
            monkeypatch.setattr(constants + "ENDPOINT", endpoint)
            monkeypatch.setattr(
                constants + "HUGGINGFACE_CO_URL_TEMPLATE",
                endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            )
            return locate("org/bert")

    whole = fake_hub._Handler
    with pytest.raises(CheckpointError, match=r"org/bert .* from the hub: "):
        located(Cut)
    found = located(whole)
    assert (found.folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_applied_adapters_of_killed_programs_go(tmp_path: Path) -> None:
    cache = store.cache_folder()
    for name in (".adapted-dead", ".adapted-alive", "adapted-org--model--c0ffee"):
        (cache / name).mkdir(parents=True)
    adapter._workplace.cache_clear()
    with alone(cache / ".adapted-alive"):
        own = adapter._workplace()
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {
        ".adapted-alive",
        "adapted-org--model--c0ffee",
        own.name,
    }
    adapter._workplace.cache_clear()
    assert adapter._workplace() != own
    assert own.is_dir()


def test_the_benchmark_kills_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "faults.py", "--computes", "3", "--merges", "1", "--processes", "3",
         "--seconds", "1", "--json", out],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert (record["compute"]["kills"], record["merges"]["kills"]) == (3, 1)
    assert record["crowd"]["runs"] > 3
    assert [record["crowd"][name] for name in ("processes", "models", "measured", "served")] == [3, 2, 2, 4]
    assert all(not record[part]["what"] for part in ("compute", "merges", "crowd"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_sees_a_torn_sidecar_and_other_numbers(model: Path, data: Path, kind: Kind) -> None:
    digest = benchmark("crowded").digest
    path = prepass.compute(job_of(model, data, kind), CPU).path
    first = digest(path)
    assert digest(path) == first
    prepass.compute(job_of(model, data, kind, seed=1), CPU)
    assert digest(path) != first
    file = next(path.glob("*.safetensors")) if kind == "diagonal" else path
    file.write_bytes(file.read_bytes()[:-1])
    assert digest(path).startswith("torn: ")
    file.unlink()
    assert digest(path).startswith("torn: " if kind == "diagonal" else "none")
