"""What only a GPU can show: the same numbers as on a processor. ``pytest tests/test_gpu.py`` where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit.processes import ALONE
from fisher_mask_mergekit.sidecar import read
from tests import tiny
from tests.benchmarks import BENCHMARKS, benchmark
from tests.launched import CASES, Case, launch, make, measured
from tests.test_cli import run
from tests.test_merges import Made
from tests.test_merges import make as make_merge

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

COUNT = torch.cuda.device_count()
HALVES = tuple(
    Case(model, {"dtype": dtype, "samples": 5})
    for model in ("bert", "llama", "mixtral")
    for dtype in ("float16", "bfloat16")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu")
    make(made)
    return made


def assert_same(got: Any, wanted: Any, near: float) -> None:
    """Two measurements of the same, each vector or matrix to a share of its length."""
    assert got.fisher.fisher.keys() == wanted.fisher.fisher.keys()
    for key, fisher in wanted.fisher.fisher.items():
        apart = float(torch.linalg.vector_norm(got.fisher.fisher[key].cpu().double() - fisher.double()))
        assert apart <= near * float(torch.linalg.vector_norm(fisher.double())), key
    assert_close(got.fisher.loss, wanted.fisher.loss, rtol=near, atol=0)
    assert_close(got.values, wanted.values, rtol=0, atol=0)
    for fact in ("samples", "one_by_one"):
        assert getattr(got.fisher, fact) == getattr(wanted.fisher, fact)


@pytest.mark.parametrize("case", [case for case in CASES if "spread" not in case.how], ids=str)
def test_measures_what_a_processor_does(case: Case, folder: Path) -> None:
    rounded = case.settings.get("dtype") == "float32"
    assert_same(measured(case, folder, GPU), measured(case, folder), 1e-4 if rounded else 1e-10)


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_half_precision_is_near_full(case: Case, folder: Path) -> None:
    """Nothing overflows or vanishes; the check that batches keep samples apart still says that they do."""
    wanted = measured(Case(case.model, {**case.settings, "dtype": "float32"}), folder)
    assert_same(measured(case, folder, GPU), wanted, 0.2)


@pytest.mark.parametrize("how", [{"recompute": True}, {"batch_tokens": 30}], ids=str)
def test_how_it_runs_changes_nothing(how: dict[str, Any], folder: Path) -> None:
    case = Case("llama", {}, how)
    assert_same(measured(case, folder, GPU), measured(Case("llama"), folder), 1e-10)


def test_what_does_not_fit_runs_in_halves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the allocator's own error; no sample is lost and none counts twice."""
    from transformers.models.bert.modeling_bert import BertOutput

    forward, tried = BertOutput.forward, set()

    def full(self: Any, hidden: Tensor, given: Tensor) -> Tensor:
        tried.add(len(hidden))
        if len(hidden) > 2:
            torch.empty(2**60, dtype=torch.uint8, device=GPU)
        result: Tensor = forward(self, hidden, given)
        return result

    wanted = measured(Case("bert"), folder)
    monkeypatch.setattr(BertOutput, "forward", full)
    assert_same(measured(Case("bert"), folder, GPU), wanted, 1e-10)
    assert {7, 1} <= tried


def test_processes_with_a_gpu_each(folder: Path) -> None:
    """Over NCCL; with a single GPU, a single process, whose weights are spread all the same."""
    for ended in launch([["-m", "tests.launched", folder, GPU]] * COUNT):
        assert ended.code == 0, ended.stderr
    together = torch.load(folder / f"{COUNT}.pt", weights_only=False, map_location="cpu")
    assert len(together) == len(CASES)
    for case in CASES:
        near = 1e-4 if case.settings.get("dtype") == "float32" else 1e-9
        assert_same(together[str(case)], measured(case, folder), near)


def test_layers_over_all_gpus(folder: Path) -> None:
    case = Case("llama", {}, {"spread": "layers"})
    got = measured(case, folder, GPU, processes=ALONE)
    assert_same(got, measured(case, folder), 1e-10)


def test_the_command_takes_the_gpu_by_itself_and_says_so(folder: Path, tmp_path: Path) -> None:
    outs = {}
    for device in ("", "cpu"):
        outs[device] = tmp_path / f"{device or GPU}.safetensors"
        options: list[str | Path] = [
            "compute",
            folder / "bert",
            "--data",
            folder / "data.jsonl",
            "--samples",
            "5",
        ]
        run(*options, "--out", outs[device], *(["--device", device] if device else []))
    found, wanted = read(outs[""]), read(outs["cpu"])
    assert torch.cuda.get_device_name() in found.metadata.model_dump_json()
    for output, nodes in wanted.fisher.items():
        for node, value in nodes.items():
            assert_close(found.fisher[output][node], value, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("options", [["--cuda"], ["--cuda", "--read-to-gpu"], ["--multi-gpu"]], ids=" ".join)
@pytest.mark.parametrize("recipe", [{}, {"parameters": {"nodes": "columns", "normalize": "tensor"}}], ids=str)
def test_merges_as_a_processor_does(tmp_path: Path, recipe: dict[str, Any], options: list[str]) -> None:
    made: Made = make_merge(tmp_path, tiny.classifier("llama"), 3)
    models = made.models(1.0, 0.5, 2.0)
    wanted = made.merge(models=models, **recipe)
    merged = made.merge(*options, out="again", models=models, **recipe)
    assert_close(merged, wanted, rtol=1e-6, atol=1e-7)


def test_the_benchmark_measures_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.json"
    options = [
        "--only",
        "pre-pass",
        "--shapes",
        "tiny",
        "--samples",
        "8",
        "--repeats",
        "1",
        "--device",
        GPU,
        "--json",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", [str(BENCHMARKS / "speed.py"), *options])
    benchmark("speed").main()
    (table,) = json.loads(out.read_text())["tables"]
    assert table["device"] == torch.cuda.get_device_name()
    assert all(row["value"] > 0 for row in table["rows"])
