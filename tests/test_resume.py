"""Measurements that are interrupted go on from what they had summed, or say why they cannot."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit import partial_sums, prepass, request
from fisher_mask_mergekit.errors import CheckpointError, MeasurementError, SidecarError
from fisher_mask_mergekit.execution import Execution
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar
from fisher_mask_mergekit.job import Job, prepare
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import METADATA_KEY, Sidecar
from fisher_mask_mergekit.store import partial_path
from tests import tiny
from tests.test_cli import run

CPU = torch.device("cpu")
TOKENS = 24
"""Per batch: a few samples."""

IN_BATCHES = Execution(TOKENS)

SOON = 1e-9
SAMPLES = 16
PATIENCE = 120


class KilledError(BaseException):
    """Instead of a signal."""


@pytest.fixture(autouse=True)
def _after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_sums, "_SHARE_OF_TIME", float("inf"))


def job_of(model: Path, data: Path, force: bool = False, out: Path | None = None, **settings: Any) -> Job:
    asked = FisherSettings(data=str(data), **{"samples": SAMPLES, **settings})
    return prepare(str(model), asked, force=force, out=out)


def measured(
    job: Job, after: int | None = None, **how: Any
) -> tuple[AnySidecar | None, list[int], list[str]]:
    """A run that ends after some batches: its sidecar, how many samples each of its batches had, what it said."""
    sizes: list[int] = []
    said: list[str] = []

    def on_batch(batch: Any) -> None:
        sizes.append(len(batch.index))
        if len(sizes) == after:
            raise KilledError

    asked: dict[str, Any] = {} if job.settings.estimator == "batch" else {"batch_tokens": TOKENS}
    asked |= {name: how.pop(name) for name in ("batch_tokens", "recompute") if name in how}
    try:
        done = prepass.compute(
            job,
            CPU,
            Execution(**asked),
            on_batch=on_batch,
            on_note=said.append,
            **{"checkpoint_every": SOON} | how,
        )
    except KilledError:
        return None, sizes, said
    return done.sidecar, sizes, said


def assert_equal(got: AnySidecar | None, wanted: AnySidecar | None) -> None:
    """To the last bit, but for when it was."""
    assert got is not None
    assert wanted is not None
    facts = [one.metadata.model_dump(exclude={"date"}) for one in (got, wanted)]
    assert facts[0] == facts[1]
    if isinstance(got, Sidecar):
        assert isinstance(wanted, Sidecar)
        assert_close(got.fisher, wanted.fisher, rtol=0, atol=0)
    if isinstance(got, FactoredSidecar):
        assert isinstance(wanted, FactoredSidecar)
        assert_close(got.packed, wanted.packed, rtol=0, atol=0)
    # A full-size sidecar's metadata has a digest of every parameter's numbers.


CASES = [
    {},
    {"labels": "sampled", "seed": 5},
    {"estimator": "batch", "batch_size": 3},
    {"dtype": "bfloat16"},
    {"kind": "factored"},
    {"kind": "diagonal"},
    {"kind": "diagonal", "labels": "exact", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_ends_with_the_numbers_of_one_that_was_never_interrupted(
    model: Path, data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    out = tmp_path / "whole" / "sidecar"
    wanted, all_sizes, said = measured(job_of(model, data, out=out, **settings))
    assert (sum(all_sizes), said) == (SAMPLES, [])
    assert list(out.parent.iterdir()) == [out]
    job = job_of(model, data, **settings)
    _, first, _ = measured(job, after=2)
    _, second, said = measured(job_of(model, data, **settings), after=1)
    assert f"going on after {sum(first)} of {SAMPLES} samples" in said[0]
    started: list[int] = []
    got, third, said = measured(job_of(model, data, **settings), on_start=started.append)
    assert f"going on after {sum(first + second)} of {SAMPLES} samples" in said[0]
    assert started == [sum(third)]
    assert first + second + third == all_sizes
    assert len(third) > 1
    assert_equal(got, wanted)
    assert_equal(read_any(job.target, job.settings.kind), wanted)
    assert list(job.target.parent.iterdir()) == [job.target]


def test_so_does_a_regression_where_nothing_can_be_right(tmp_path: Path, data: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model", labels=1)
    wanted, *_ = measured(job_of(model, data, out=tmp_path / "sidecar"))
    measured(job_of(model, data), after=2)
    got, _, said = measured(job_of(model, data))
    assert "going on after" in said[0]
    assert_equal(got, wanted)
    assert got is not None
    assert got.metadata.accuracy is None


def test_one_that_was_interrupted_behind_the_last_batch(model: Path, data: Path, tmp_path: Path) -> None:
    wanted, sizes, _ = measured(job_of(model, data, out=tmp_path / "sidecar"))
    measured(job_of(model, data), after=len(sizes))
    got, again, _ = measured(job_of(model, data))
    assert again == []
    assert_equal(got, wanted)


def test_goes_on_after_kill_9(model: Path, data: Path, tmp_path: Path) -> None:
    samples, partial = 400, partial_path(job_of(model, data).target)
    data = tiny.write_data(data, rows=samples)
    arguments = [
        "compute",
        str(model),
        "--data",
        str(data),
        "--samples",
        str(samples),
        "--batch-tokens",
        "16",
    ]
    arguments += ["--checkpoint-every", str(SOON), "--device", "cpu"]
    with subprocess.Popen(
        [Path(sys.executable).with_name("mergekit-fisher"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not partial.exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [file.name for file in partial.parent.iterdir() if file.suffix == ".safetensors"] == []
    said = run(*arguments).stderr
    assert said.startswith(f"{model}: going on after ")
    assert f" of {samples} samples that an interrupted run measured ({partial})" in said
    got = job_of(model, data, samples=samples).served
    wanted, *_ = measured(
        job_of(model, data, samples=samples, out=tmp_path / "whole"), batch_tokens=16, checkpoint_every=0
    )
    assert_equal(got, wanted)
    assert [file.name for file in partial.parent.iterdir()] == ["mask_fisher.safetensors"]


@pytest.mark.parametrize("kind", ["mask", "diagonal"])
@pytest.mark.parametrize(
    ("change", "how", "what"),
    [
        ({"seed": 1}, {}, r": seed 0, now 1\. Run"),
        ({"labels": "sampled"}, {}, "labels data, now sampled"),
        ({"max_length": 9}, {}, r": max_length none, now 9\. Run"),
        ({"batch_size": 2}, {}, "batch_size none, now 2"),
        ({}, {"batch_tokens": 23}, "batch_tokens 24, now 23"),
        ({"samples": 8}, {}, r": samples 16, now 8\. Run"),
    ],
)
def test_other_options_refuse_to_go_on_and_say_which(
    model: Path, data: Path, kind: str, change: dict[str, Any], how: dict[str, Any], what: str
) -> None:
    measured(job_of(model, data, kind=kind), after=2)
    job = job_of(model, data, **{"kind": kind} | change)
    left = partial_path(job.target).read_bytes()
    with pytest.raises(
        SidecarError, match=rf"left sums over \d+ of 16 samples .*{what}.* begin anew, with --force"
    ):
        measured(job, **how)
    assert partial_path(job.target).read_bytes() == left
    # The command of then goes on.
    assert "going on after" in measured(job_of(model, data, kind=kind), after=1)[2][0]
    _, sizes, said = measured(job_of(model, data, force=True, **{"kind": kind} | change), **how)
    assert sum(sizes) == change.get("samples", SAMPLES)
    assert "beginning anew: --force; what an interrupted run summed" in said[0]
    assert not partial_path(job.target).exists()


def test_a_message_names_some_differences_however_many_there_are(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"field {number}": number for number in range(1000)}
    with monkeypatch.context() as patch:
        patch.setattr(prepass, "request_of", lambda *_: many)
        measured(job_of(model, data), after=2)
    with pytest.raises(SidecarError, match=r" and 10\d\d more\. Run its command again") as caught:
        measured(job_of(model, data))
    assert len(str(caught.value)) < 2000


def test_layers_that_run_again_and_another_version_refuse_too(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(job_of(model, data), after=2)
    with pytest.raises(SidecarError, match=r": recompute False, now True\."):
        measured(job_of(model, data), recompute=True)
    monkeypatch.setattr(request, "version", lambda library: "9.9")
    with pytest.raises(SidecarError, match=r"torch 2\.\S+, now 9\.9; transformers 5"):
        measured(job_of(model, data))


def test_other_rows_and_another_checkpoint_refuse_too(model: Path, data: Path) -> None:
    measured(job_of(model, data), after=2)
    tiny.write_data(data, seed=1)
    with pytest.raises(SidecarError, match=r": the drawn rows [0-9a-f]{12}, now [0-9a-f]{12}; their tokens "):
        measured(job_of(model, data))
    tiny.write_data(data)
    tensors = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    known = job_of(model, data).weights
    tensors[name][3, 5] += 1e-3  # None of the values that it is known by.
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert job_of(model, data).weights == known
    with pytest.raises(
        SidecarError, match=r": the checkpoint's model.safetensors [0-9a-f]{12}, now [0-9a-f]{12}\."
    ):
        measured(job_of(model, data))


def test_a_checkpoint_of_another_shape_refuses_too(model: Path, data: Path) -> None:
    measured(job_of(model, data), after=2)
    tiny.checkpoint(model, num_hidden_layers=1)
    with pytest.raises(
        SidecarError, match=r": the checkpoint's config.json .*; the checkpoint's model.safetensors "
    ):
        measured(job_of(model, data))


def test_a_checkpoint_that_changes_ends_a_run_at_once_and_leaves_no_sums(model: Path, data: Path) -> None:
    job = job_of(model, data)
    sizes: list[int] = []

    def change(batch: Any) -> None:
        sizes.append(len(batch.index))
        if len(sizes) == 2:
            os.utime(model / "config.json", ns=(0, 0))

    with pytest.raises(CheckpointError, match=r"changed while it was measured \(config.json\)"):
        prepass.compute(job, CPU, IN_BATCHES, checkpoint_every=SOON, on_batch=change)
    assert len(sizes) == 2
    assert list(job.target.parent.iterdir()) == []


def test_without_saving_nothing_is_written_or_gone_on_from(model: Path, data: Path) -> None:
    job = job_of(model, data)
    measured(job, after=2, checkpoint_every=0)
    assert list(job.target.parent.iterdir()) == []
    measured(job, after=2)
    assert partial_path(job.target).is_file()
    _, sizes, said = measured(job_of(model, data), checkpoint_every=0)
    assert (sum(sizes), said) == (SAMPLES, [])
    assert not partial_path(job.target).exists()  # There is nothing left to go on with.


def test_saves_no_more_often_than_asked_and_spends_little_time_on_it(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    now, written = 0.0, []

    class Slow(partial_sums.PartialSums[Any]):
        def _write(self, metadata: Any, tally: Any) -> None:
            nonlocal now
            written.append(now)
            now += 10

    monkeypatch.setattr("time.monotonic", lambda: now)
    sums = Slow(data, dict, {}, 1000, 60, print)
    for second in range(1000):
        now = max(now, float(second))
        sums.keep(partial_sums.Tally(samples=1), lambda: None)
    assert written == [60, 270, 480, 690, 900]


def edited(
    change: Callable[[dict[str, Tensor]], object], text: Callable[[str], str] = str
) -> Callable[[Path], None]:
    """Changed, and with a checksum of what it is now."""

    def edit(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            body = file.metadata()[METADATA_KEY].rpartition(',"checksum":"')[0] + "}"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {METADATA_KEY: seal(text(body), tensors)})

    return edit


SITE = "bert.encoder.layer.0.attention.output.dense.head_fisher"


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "holds no partial sums: "),
        (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
        (lambda path: save_file({SITE: torch.ones(4)}, path), "holds no partial sums: "),
        (flipped, "is damaged: its checksum is of something else"),
        (edited(lambda tensors: tensors[SITE].neg_()), f"{SITE} has values that are negative"),
        (edited(lambda tensors: tensors[SITE].fill_(float("nan"))), f"{SITE} has values that are negative, not finite"),
        (edited(lambda tensors: tensors.update({SITE: tensors[SITE].long()})), "or torch.int64"),
        (edited(len, lambda text: text.replace('"format_version":1', '"format_version":2')), "has format version 2"),
        (edited(len, lambda text: text.replace('"samples":', '"samples":9')), "metadata field '': Value error"),
        (edited(len, lambda text: text.replace('"total":', '"more":1,"total":')), "metadata field 'more': Extra inputs"),
    ],
)  # fmt: skip
def test_sums_that_are_torn_or_tampered_with_are_told_of_and_left_out_of_account(
    model: Path, data: Path, tmp_path: Path, change: Callable[[Path], None], what: str
) -> None:
    wanted, *_ = measured(job_of(model, data, out=tmp_path / "sidecar"))
    job = job_of(model, data)
    measured(job, after=2)
    change(partial_path(job.target))
    got, sizes, said = measured(job)
    assert said[0].startswith("the sums of an interrupted run cannot be used, so this one begins anew: ")
    assert what in said[0]
    assert sum(sizes) == SAMPLES
    assert_equal(got, wanted)


@pytest.mark.parametrize("kind", ["mask", "factored", "diagonal"])
def test_sums_of_another_shape_are_an_error(model: Path, data: Path, kind: str) -> None:
    job = job_of(model, data, kind=kind)
    measured(job, after=2)

    def widen(tensors: dict[str, Tensor]) -> None:
        name = max(tensors)
        tensors[name] = tensors[name].expand(2, *tensors[name].shape).contiguous()

    kept = partial_path(job.target).read_bytes()
    edited(lambda tensors: tensors.update(more=torch.ones(1)))(partial_path(job.target))
    with pytest.raises(
        MeasurementError, match=r"do not fit the model: of more they are \[1\], expected none; begin"
    ):
        measured(job)
    partial_path(job.target).write_bytes(kept)
    edited(widen)(partial_path(job.target))
    with pytest.raises(
        MeasurementError, match=r"do not fit the model: of .* are \[2, .* begin anew, with --force"
    ):
        measured(job)


def test_nobody_goes_on_with_the_sums_of_a_run_that_is_not_over(model: Path, data: Path) -> None:
    jobs = [job_of(model, data) for _ in range(2)]
    waited: list[bool] = []

    def wait() -> None:
        waited.append(partial_path(jobs[0].target).exists())
        raise KilledError

    def other(batch: Any) -> None:
        if not waited:
            with pytest.raises(KilledError):
                prepass.compute(jobs[1], CPU, IN_BATCHES, checkpoint_every=SOON, on_wait=wait)

    prepass.compute(jobs[0], CPU, IN_BATCHES, checkpoint_every=SOON, on_batch=other)
    assert waited == [True]
    assert prepass.compute(jobs[1], CPU).served


def test_sums_that_cannot_be_written_are_said_once_and_measuring_goes_on(model: Path, data: Path) -> None:
    job = job_of(model, data)
    partial_path(job.target).mkdir(parents=True)
    got, sizes, said = measured(job)
    assert got is not None
    assert sum(sizes) == SAMPLES
    assert len(said) == 1
    assert "partial: Is a directory; measuring goes on, and begins anew if it is interrupted" in said[0]
    assert {file.name for file in job.target.parent.iterdir()} == {
        job.target.name,
        partial_path(job.target).name,
    }
