"""Several processes that measure together: what one gives, whatever their number; and how they end."""

import re
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import typer
from torch.testing import assert_close

from fisher_mask_mergekit import processes
from fisher_mask_mergekit.batches import Limit, batches_in_step, dealt
from fisher_mask_mergekit.cli.launched import is_launched, spread_by_launcher
from fisher_mask_mergekit.cli.output import errors
from fisher_mask_mergekit.diagonal import diagonal_fisher
from fisher_mask_mergekit.encoding import EncodedSamples
from fisher_mask_mergekit.errors import CheckpointError, DataError, ProcessError, RecipeError, ToldError
from fisher_mask_mergekit.execution import Execution, check_options, own_device
from fisher_mask_mergekit.factored import factored_fisher
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.loading import check_on_gpus
from fisher_mask_mergekit.processes import one_error
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import read
from fisher_mask_mergekit.tasks import Encoded
from tests import tiny
from tests.launched import CASES, Case, Ended, free_port, launch, make, measured, places
from tests.test_cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    make(made)
    return made


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_nothing(folder: Path, count: int) -> None:
    for ended in launch([["-m", "tests.launched", folder, "cpu"]] * count):
        assert ended.code == 0, ended.stderr
    together = torch.load(folder / f"{count}.pt", weights_only=False)
    assert len(together) == len(CASES)
    for case in CASES:
        got, wanted = together[str(case)], measured(case, folder)
        rounded = case.settings.get("dtype") == "float32"  # By batches of other samples, too.
        for key, fisher in wanted.fisher.fisher.items():
            near = 1e-6 * float(fisher.norm()) if rounded else 1e-14
            rtol = 0 if rounded else 1e-9
            assert_close(got.fisher.fisher[key], fisher, rtol=rtol, atol=near, msg=f"{case}: {key}")
        assert got.fisher.fisher.keys() == wanted.fisher.fisher.keys()
        assert_close(got.fisher.loss, wanted.fisher.loss, rtol=1e-6, atol=0)
        assert_close(got.values, wanted.values, rtol=0, atol=0)
        for fact in ("samples", "accuracy", "one_by_one"):
            assert getattr(got.fisher, fact) == getattr(wanted.fisher, fact), case
        assert got.notes == wanted.notes, case


def command(folder: Path, *options: Any) -> list[Any]:
    return [
        "-m",
        "fisher_mask_mergekit",
        "compute",
        folder / "bert",
        "--samples",
        "5",
        "--device",
        "cpu",
        *options,
    ]


def told(ended: list[Ended]) -> list[str]:
    """The errors that all processes tell; torch's own lines of what its C++ was doing are none."""
    lines = [line for one in ended for line in (one.stdout + one.stderr).splitlines()]
    return [line for line in lines if re.match(r"[\w.]+Error\b|Traceback", line)]


def test_the_first_process_alone_writes_and_speaks_and_serves(folder: Path, tmp_path: Path) -> None:
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    out = tmp_path / "made.safetensors"
    options = ["--data", folder / "data.jsonl", "--out", out]
    (ended,) = launch([[*launcher, *command(folder, *options)]], alone=True)
    assert ended.code == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert line.startswith(f"{folder / 'bert'}: 5 samples, ")
    assert list(tmp_path.iterdir()) == [out]
    assert "measured before" in run(*command(folder, *options)[2:]).stdout
    wanted = measured(Case("bert", {"samples": 5, "dtype": "float32"}), folder).fisher.fisher
    got = {
        (output, node): value for output, nodes in read(out).fisher.items() for node, value in nodes.items()
    }
    assert_close(got, wanted, rtol=1e-4, atol=1e-9, check_dtype=False)


def test_processes_that_read_other_rows_refuse_with_one_error(folder: Path, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for seed, place in enumerate(places):
        place.mkdir()
        tiny.write_data(place / "data.jsonl", seed=seed)
    ended = launch([command(folder, "--data", "data.jsonl", "--out", "made.safetensors")] * 2, folders=places)
    assert [one.code for one in ended] == [1, 1]
    (line,) = told(ended)
    assert re.search(
        r"ProcessError: .*/bert: process 1 on \S+ has the drawn rows \w+, process 0 on \S+ has \w+", line
    )
    assert not [file for place in places for file in place.glob("*.safetensors")]


STOPS = """
import os, signal, sys, time
from fisher_mask_mergekit import passes, pulse
from fisher_mask_mergekit.cli import main
pulse.BEAT, stop = 0.2, sys.argv.pop(1)
if os.environ["RANK"] == "0":
    pulse.SILENCE, pulse.PATIENCE = 6 if stop == "killed" else 3600, 6 if stop == "hangs" else 3600
else:
    def checked(losses, batch):
        if stop == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        os._exit(9)
    passes._check_losses = checked
main()
"""


@pytest.mark.parametrize(
    ("stop", "reason", "spread"),
    [
        (
            "killed",
            r"no contact to the other processes: [^;]*Connection (closed|reset) by peer[^;]*; one of them ended",
            ["--spread", "shards"],
        ),
        (
            "killed",
            "process 1 of 2 gives no sign of life for 0.1 minutes: it was killed, or its machine ",
            [],
        ),
        ("hangs", "process 1 of 2 hangs: it has measured nothing for 0.1 minutes", []),
    ],
)
def test_a_process_that_is_killed_or_hangs_ends_the_run(
    folder: Path, tmp_path: Path, stop: str, reason: str, spread: list[str]
) -> None:
    """The one that is killed closes its connections, or gives no sign of life; the one that hangs measures nothing."""
    options = command(
        folder, "--data", folder / "data.jsonl", "--out", tmp_path / "made.safetensors", *spread
    )[2:]
    ended = launch([["-c", STOPS, stop, *options]] * 2, until=0)
    assert [one.code for one in ended] == [1, -9]
    (line,) = told(ended)
    assert re.match(f"ProcessError: {reason}", line)
    assert "gloo" not in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.HashStore:
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    return dist.HashStore()


def test_of_several_errors_that_of_the_first_to_fail_is_told(store: dist.HashStore) -> None:
    with pytest.raises(DataError, match=r"^process 1 of 3, on \S+: no rows$"), one_error(store, 1, 3):
        raise DataError("no rows")
    for rank in (0, 2):
        with pytest.raises(ToldError, match="lost"), one_error(store, rank, 3):
            raise ProcessError("lost")


def test_the_first_process_tells_an_error_as_if_it_were_alone(store: dist.HashStore) -> None:
    with pytest.raises(DataError, match=r"^no rows$"), one_error(store, 0, 3):
        raise DataError("no rows")


def test_what_another_process_told_is_not_told_again() -> None:
    with pytest.raises(typer.Exit) as exit_, errors():
        raise ToldError("no rows")
    assert exit_.value.exit_code == 1


def test_ctrl_c_is_told_once(store: dist.HashStore) -> None:
    with pytest.raises(KeyboardInterrupt), one_error(store, 0, 2):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as exit_, one_error(store, 1, 2):
        raise KeyboardInterrupt
    assert exit_.value.code == 130


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in places(1, 2, 29500).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_a_process_is_launched_if_it_has_a_place_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()
    assert is_launched(least=1)
    monkeypatch.delenv("LOCAL_RANK")  # As a cluster sets the others for all that runs in it.
    assert not is_launched(least=1)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in (None, "cuda"):
        assert [own_device(name, place, 2) for place in range(2)] == [
            torch.device("cuda", 0),
            torch.device("cuda", 1),
        ]
    assert own_device("cpu", 1, 3) == torch.device("cpu")
    with pytest.raises(
        RecipeError,
        match=r"^3 processes were started on this machine, which has 2 GPUs: start one for each \(torchrun --nproc-per-node 2 ",
    ):
        own_device(None, 0, 3)
    with pytest.raises(
        RecipeError, match="device 'cuda:1' is one for all processes; give --device cuda, and each"
    ):
        own_device("cuda:1", 1, 2)


def test_a_process_that_is_shown_one_gpu_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert own_device(None, 3, 4) == torch.device("cuda", 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(RecipeError, match="4 processes were started on this machine, which has 1 GPU:"):
        own_device(None, 3, 4)


def test_no_device_is_silently_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="several processes cannot measure on mps; give --device cpu"):
        own_device("mps", 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "nothing"):
        with pytest.raises(RecipeError, match=f"device '{name}' cannot be used: "):
            own_device(name, 0, 2)


@pytest.mark.usefixtures("second_of_two")
def test_other_commands_refuse_to_run_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run("inspect", tmp_path, code=2).stderr == ""
    monkeypatch.setenv("RANK", "0")
    assert (
        "inspect runs in one process; launch compute alone in several"
        in run("inspect", tmp_path, code=2).stderr
    )


def test_parts_take_processes(folder: Path) -> None:
    options = command(folder, "--data", folder / "data.jsonl", "--spread", "shards")[2:]
    assert "--spread shards and offload take processes to spread over" in run(*options, code=1).stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--kind", "diagonal"],
            "kind 'diagonal' has sums for every weight in every process; it takes no --spread offload",
        ),
        (
            ["--kind", "factored"],
            "kind 'factored' has sums for every weight in every process; it takes no --spread offload",
        ),
        (
            ["--estimator", "batch"],
            "estimator 'batch' may end with a smaller batch, .* it takes no --spread offload",
        ),
    ],
)
def test_what_takes_no_parts(options: list[str], reason: str) -> None:
    settings = FisherSettings.model_validate({name.removeprefix("--"): value for name, value in [options]})
    with pytest.raises(RecipeError, match=reason):
        check_options(settings, Execution(spread="offload"))
    check_options(settings, Execution(spread="layers"))


def test_accelerates_own_configuration_asks_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread_by_launcher() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert spread_by_launcher() == "shards"
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert spread_by_launcher() == "offload"


def test_layers_take_gpus_and_one_process(folder: Path) -> None:
    options = command(folder, "--data", folder / "data.jsonl", "--spread", "layers")[2:]
    assert "--spread layers is for one process" in run(*options, code=1).stderr
    if not torch.cuda.is_available():
        alone = [option for option in options if option not in ("--device", "cpu")]
        assert "--spread layers takes GPUs, and there is none here" in run(*alone, code=1).stderr
    model = SimpleNamespace(hf_device_map={"bert.embeddings": 0, "bert.encoder": "disk", "classifier": "cpu"})
    with pytest.raises(
        CheckpointError, match="bert does not fit on the GPUs here: layers were left on cpu, disk"
    ):
        check_on_gpus("bert", model)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ({}, "disk"),
        ({"recompute": True}, "disk"),
        ({"labels": "exact"}, "disk"),
        ({"kind": "factored", "labels": "exact"}, "cpu"),
        ({"kind": "diagonal", "labels": "exact"}, "cpu"),
    ],
    ids=str,
)
def test_layers_that_accelerate_runs_are_measured_alike(
    tmp_path: Path, how: dict[str, Any], place: str
) -> None:
    """With the hooks that it has for several GPUs; the weights of a layer on the disk are fetched when it runs."""
    model, drawn = tiny.classifier("bert"), tiny.batches(tiny.samples(7), 3)
    sites = tiny.sites_of(model)

    def measure(kind: str = "mask", **how: Any) -> Any:
        if kind == "diagonal":
            return diagonal_fisher(model, drawn, tiny.TASK, **how).fisher
        if kind == "factored":
            return factored_fisher(model, drawn, tiny.TASK, **how).fisher
        return mask_fisher(model, drawn, sites, tiny.TASK, **how).fisher

    wanted = measure(**how)
    layers = dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0", "bert.pooler", "classifier"), "cpu")
    layers["bert.encoder.layer.1"] = place
    accelerate.dispatch_model(model, layers, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert hasattr(model.bert.encoder.layer[1].output.dense, "_hf_hook")
    assert model.bert.encoder.layer[1].output.dense.weight.is_meta == (place == "disk")
    assert_close(measure(**how), wanted, rtol=0, atol=0)


def test_dealt_samples_are_alike_and_dealt_batches_whole() -> None:
    samples = {
        i: Encoded({"input_ids": [1] * length}, 0, False) for i, length in enumerate([1, 5, 2, 4, 3, 6, 7])
    }
    encoded = EncodedSamples(samples, 2, 1)
    shares = [list(dealt(encoded, rank, 3).samples) for rank in range(3)]
    assert shares == [[0, 3, 6], [4, 5], [1, 2]]
    shares = [list(dealt(encoded, rank, 3, batch=2).samples) for rank in range(3)]
    assert shares == [[0, 1, 6], [2, 3], [4, 5]]
    assert not dealt(encoded, 7, 8).samples


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [Limit(), Limit(tokens=12), Limit(rows=2), Limit(tokens=1)], ids=str)
def test_batches_in_step_are_as_many_and_as_large_in_every_process(count: int, limit: Limit) -> None:
    lengths = [1, 5, 2, 4, 3, 6, 7]
    samples = {i: Encoded({"input_ids": [1] * length}, 0, False) for i, length in enumerate(lengths)}
    made = [
        list(
            batches_in_step(
                EncodedSamples(samples, 0, 0), tiny.tokenizer(), limits=repeat(limit), rank=rank, count=count,
                device=torch.device("cpu"),
            )
        )
        for rank in range(count)
    ]  # fmt: skip
    sizes = [[len(batch.index) for batch in batches] for batches in made]
    assert sizes == [sizes[0]] * count
    counted = [index for batches in made for batch in batches if batch.counts for index in batch.index]
    assert sorted(counted) == list(range(len(lengths)))
    for batch in (batch for batches in made for batch in batches):
        assert len(batch.index) == 1 or limit.allows(
            len(batch.index), max(lengths[index] for index in batch.index)
        )
