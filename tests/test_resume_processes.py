"""A measurement in several processes that is interrupted goes on from what each of them had summed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fisher_mask_mergekit.errors import SidecarError
from fisher_mask_mergekit.opening import read_any
from fisher_mask_mergekit.partial_sums import PartialSums
from fisher_mask_mergekit.processes import Processes
from fisher_mask_mergekit.store import alone, partial_path, partials
from fisher_mask_mergekit.tally import Tally
from tests.launched import Ended, launch
from tests.test_cli import run
from tests.test_resume import SAMPLES, SOON, assert_equal, job_of, measured

STOPS = """
import json, os, signal, sys
from fisher_mask_mergekit import partial_sums, passes, pulse
from fisher_mask_mergekit.cli import main
log, stops = sys.argv.pop(1), json.loads(sys.argv.pop(1))
partial_sums._SHARE_OF_TIME = float("inf")
if stops:
    pulse.BEAT, pulse.SILENCE = 0.2, 6
rank, check, left = os.environ["RANK"], passes._check_losses, stops.get(os.environ["RANK"], 1000)
def checked(losses, batch):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    with open(log, "a") as file:
        print(rank, *batch.index, file=file)
    check(losses, batch)
passes._check_losses = checked
main()
"""
"""Each process is killed before its n-th batch; it notes which samples it measures."""


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    """Where two processes run that see only their own disk."""
    made = [tmp_path / "one", tmp_path / "two"]
    for place in made:
        place.mkdir()
    return made


def together(
    model: Path, data: Path, out: Path, log: Path, kind: str = "mask",
    stops: dict[str, int] | None = None, folders: Sequence[Path] | None = None,
) -> list[Ended]:  # fmt: skip
    """Two processes that save their sums after every batch."""
    options = ["compute", model, "--data", data, "--samples", SAMPLES, "--kind", kind, "--out", out]
    options += ["--batch-tokens", 16, "--checkpoint-every", SOON, "--device", "cpu"]
    command = ["-c", STOPS, log, json.dumps(stops or {}), *options]
    return launch([command] * 2, folders=folders)


def noted(log: Path) -> dict[str, list[int]]:
    """Which samples each process measured."""
    samples: dict[str, list[int]] = {"0": [], "1": []}
    for line in log.read_text().splitlines() if log.exists() else []:
        rank, *index = line.split()
        samples[rank] += map(int, index)
    return samples


def test_what_the_processes_had_is_not_measured_again(model: Path, data: Path, tmp_path: Path) -> None:
    """The first had measured all of its share when the other was killed."""
    out, logs = tmp_path / "out" / "sidecar", [tmp_path / "first", tmp_path / "second"]
    killed = together(model, data, out, logs[0], stops={"1": 1})
    assert [one.code for one in killed] == [1, -9]
    assert "gives no sign of life" in killed[0].stderr
    assert set(out.parent.iterdir()) == {partial_path(out, rank, 2) for rank in range(2)}
    first = noted(logs[0])
    assert len(first["0"]) == SAMPLES // 2
    assert 0 < len(first["1"]) < SAMPLES // 2

    ended = together(model, data, out, logs[1])
    assert [one.code for one in ended] == [0, 0], ended
    done = sum(map(len, first.values()))
    going_on = f"{model}: going on after {done} of {SAMPLES} samples that an interrupted run measured (in 2 processes)"
    assert going_on in ended[0].stderr.splitlines()
    second = noted(logs[1])
    assert second["0"] == []
    assert sorted(first["1"] + second["1"] + first["0"]) == list(range(SAMPLES))
    assert list(out.parent.iterdir()) == [out]

    whole = tmp_path / "whole"
    assert [one.code for one in together(model, data, whole, tmp_path / "third")] == [0, 0]
    assert_equal(read_any(out), read_any(whole))


def test_so_it_is_where_each_sees_its_own_disk_and_one_is_lost(
    model: Path, data: Path, tmp_path: Path, places: list[Path]
) -> None:
    out, logs = Path("sidecar"), [tmp_path / "first", tmp_path / "second"]
    together(model, data, out, logs[0], kind="diagonal", stops={"0": 2, "1": 1}, folders=places)
    assert [partials(place / out) for place in places] == [
        {partial_path(place / out, rank, 2): 2} for rank, place in enumerate(places)
    ]
    shutil.rmtree(places[0])
    places[0].mkdir()
    ended = together(model, data, out, logs[1], kind="diagonal", folders=places)
    assert [one.code for one in ended] == [0, 0], ended
    first, second = noted(logs[0]), noted(logs[1])
    assert f"going on after {len(first['1'])} of {SAMPLES} samples" in ended[0].stderr
    assert sorted(second["0"] + first["1"] + second["1"]) == list(range(SAMPLES))
    assert [[file.name for file in place.iterdir()] for place in places] == [["sidecar"], []]
    whole = tmp_path / "whole"
    partial_path(whole, 1, 2).mkdir()
    ended = together(model, data, whole, tmp_path / "third", kind="diagonal")
    unwritten = f"{model}: process 1 of 2: cannot write {partial_path(whole, 1, 2)}: Is a directory; measuring goes on"
    assert unwritten in ended[1].stderr
    assert ended[0].stdout.startswith(f"{model}: 16 samples, ")
    assert_equal(read_any(places[0] / out), read_any(whole))


def left_by(target: Path, rank: int, count: int) -> Path:
    """Sums of one of several processes."""
    sums: PartialSums[Any] = PartialSums(target, lambda: {}, {}, 8, SOON, print, Processes(rank, count))
    sums.keep(Tally(samples=3), lambda: None)
    return sums.path


def test_another_number_of_processes_refuses_and_says_so(model: Path, data: Path) -> None:
    job = job_of(model, data)
    left = [left_by(job.target, rank, 3) for rank in (0, 2)]
    with pytest.raises(SidecarError, match=r"left sums over 3 of 8 samples .*: processes 3, now 1"):
        measured(job)
    assert set(job.target.parent.iterdir()) == set(left)
    measured(job_of(model, data, force=True), after=1)
    assert set(job.target.parent.iterdir()) == {partial_path(job.target)}  # The others have no use any more.
    partial_path(job.target, 1, 2).touch()
    measured(job_of(model, data))
    assert list(job.target.parent.iterdir()) == [job.target]


def test_several_refuse_what_one_left(model: Path, data: Path) -> None:
    job = job_of(model, data)
    measured(job, after=2)
    sums: PartialSums[Any] = PartialSums(job.target, lambda: {}, {}, 8, SOON, print, Processes(1, 2))
    with pytest.raises(SidecarError, match="processes 1, now 2"):
        sums.begin(1 << 30, anew=False)
    said: list[str] = []
    sums.say = said.append
    assert sums.begin(1 << 30, anew=True) is None
    assert "beginning anew: --force" in said[0]


def test_sums_of_another_process_are_not_this_ones(tmp_path: Path) -> None:
    target = tmp_path / "sidecar"
    left_by(target, 0, 2).rename(partial_path(target, 1, 2))
    sums: PartialSums[Any] = PartialSums(target, lambda: {}, {}, 8, SOON, print, Processes(1, 2))
    with pytest.raises(SidecarError, match="process 0, now 1"):
        sums.begin(1 << 30, anew=False)


def test_what_is_half_written_goes_with_who_measures_there_next(tmp_path: Path) -> None:
    target = tmp_path / "sidecar"
    whole = left_by(target, 0, 2)
    halves = [tmp_path / f".{partial_path(target, rank, 2).name}.abcdefgh" for rank in range(2)]
    others = [
        tmp_path / name for name in (".sidecar.partial-0-of-two", ".sidecar2.partial-0-of-2", "..sidecar.ab")
    ]
    for file in (*halves, *others):
        file.touch()
    assert partials(target) == {whole: 2}
    PartialSums(target, lambda: {}, {}, 8, 0, print, Processes(1, 2)).begin(0, anew=False)
    assert set(tmp_path.iterdir()) == {whole, halves[0], *others}  # Another process may be writing its own.
    with alone(target):
        pass
    assert set(tmp_path.iterdir()) == {whole, *others}


def test_parts_of_a_model_save_nothing(model: Path, data: Path) -> None:
    """As all must go on from one point."""
    command: list[Any] = [
        "-m",
        "fisher_mask_mergekit",
        "compute",
        model,
        "--data",
        data,
        "--samples",
        4,
        "--device",
        "cpu",
    ]
    (ended,) = launch([[*command, "--spread", "shards", "--checkpoint-every", SOON]])
    assert ended.code == 0, ended.stderr
    assert "with --spread, no sums are saved on the way: what is interrupted begins anew" in ended.stderr
    assert run(*command[2:]).stdout.count("measured before") == 1
