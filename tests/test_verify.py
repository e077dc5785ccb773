"""`mergekit-fisher verify`: what passes, and every way in which a sidecar can be another."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fisher_mask_mergekit import measure_diagonal, measure_mask, store
from fisher_mask_mergekit.diagonal_sidecar import DiagonalMetadata, read_diagonal, write_diagonal
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.remeasure import refuted, rounding
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from tests import tiny
from tests.families import FAMILIES, build
from tests.test_architectures import compute_checkpoint
from tests.test_cli import run

OUTPUT = "bert.encoder.layer.0.attention.output.dense"
SAMPLES = 16


def measure(folder: Path, data: Path, **settings: Any) -> Path:
    request = FisherSettings(data=str(data), **{"samples": SAMPLES} | settings)
    return compute(prepare(str(folder), request), torch.device("cpu")).path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measured checkpoint and its data."""
    folder = tmp_path_factory.mktemp("measured")
    measure(tiny.checkpoint(folder / "model"), tiny.write_data(folder / "data.jsonl", rows=40))
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkpoint, its sidecar beside it."""
    monkeypatch.chdir(original)
    return Path(shutil.copytree(original / "model", tmp_path / "model"))


def verify(*arguments: str | int | Path, code: int = 0) -> dict[str, list[str]]:
    """By what was checked, the verdict and the detail."""
    out = run("verify", *map(str, arguments), code=code).stdout
    lines = [line.split(": ", 2) for line in out.splitlines()]
    assert (code == 1) == any(verdict == "failed" for verdict, _, _ in lines)
    return {what: [verdict, detail] for verdict, what, detail in lines}


def refused(*arguments: str | int | Path) -> str:
    return run("verify", *map(str, arguments), code=1).stderr


def tampered(model: Path, change: Callable[[Sidecar], Sidecar | None]) -> Path:
    """The same sidecar with something changed, whole otherwise."""
    path = model / store.BESIDE
    made = read(path)
    write(change(made) or made, path)
    return path


def rewritten(
    folder: Path, change: Callable[[DiagonalMetadata, dict[str, Tensor]], DiagonalMetadata]
) -> None:
    """The same full-size sidecar with something changed, whole otherwise."""
    made = read_diagonal(folder)
    numbers = {record.names[0]: made.fisher(record) for record in made.metadata.tensors}
    write_diagonal(change(made.metadata, numbers), numbers.__getitem__, folder)


def change_weights(model: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_a_sidecar_beside_its_checkpoint_passes(model: Path) -> None:
    found = verify(model / store.BESIDE)
    assert {what: verdict for what, (verdict, _) in found.items()} == {
        "file": "ok",
        "values": "ok",
        "weights": "ok",
    }
    assert "is whole: 16 samples" in found["file"][1]
    assert found["values"][1].endswith("has the stored values in 32 tensors")
    assert found["weights"][1] == "names, shapes and sixteen values of all 41 tensors have the stored digest"
    assert verify(model).keys() == found.keys()
    answer = json.loads(run("verify", model, "--json").stdout)
    assert (answer["ok"], answer["sidecar"]) == (True, str(model))
    assert [check["what"] for check in answer["checks"]] == list(found)


def test_without_a_checkpoint_only_the_file_is_checked(model: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(model / store.BESIDE, tmp_path / "alone.safetensors"))
    odd = read(alone)
    write(replace(odd, metadata=odd.metadata.model_copy(update={"checkpoint": "a b; c"})), alone)
    verdict, detail = verify(alone)["values"]
    assert verdict == "not checked"
    assert detail.endswith("compare it with one:  --model 'a b; c'")
    assert verify(alone, "--model", model)["weights"][0] == "ok"
    assert "--recompute needs the checkpoint: the sidecar lies in no" in refused(alone, "--recompute", "2")
    assert "there is no sidecar for" in refused(tmp_path)


@pytest.mark.parametrize("content", [lambda whole: whole[:-8], lambda whole: whole[:-1] + b"?", None])
def test_a_damaged_file_is_a_check_that_failed(model: Path, content: Callable[[bytes], bytes] | None) -> None:
    path = model / store.BESIDE
    path.unlink() if content is None else path.write_bytes(content(path.read_bytes()))
    verdict, detail = verify(path, code=1)["file"]
    assert str(path) in detail
    answer = json.loads(run("verify", path, "--json", code=1).stdout)
    assert answer["ok"] is False
    assert answer["checks"] == [{"what": "file", "verdict": verdict, "detail": detail}]


def test_another_checkpoint_fails(model: Path, tmp_path: Path) -> None:
    other = tiny.sibling(tmp_path / "other", model, seed=1)
    found = verify(model / store.BESIDE, "--model", other, "--recompute", "2", code=1)
    assert "32 of 32 tensors have other values than were stored, 'bert." in found["values"][1]
    assert found["weights"][0] == "failed"
    assert f"measure this one:  mergekit-fisher compute {other} --kind mask" in found["weights"][1]
    assert found["numbers"] == ["not checked", "this checkpoint's would be others"]
    foreign = tiny.checkpoint(tmp_path / "foreign", "distilbert")
    assert (
        "it has none of the tensors" in verify(model / store.BESIDE, "--model", foreign, code=1)["values"][1]
    )


def test_another_head_and_layers_in_each_others_place_fail(model: Path) -> None:
    change_weights(model, lambda tensors: tensors["classifier.weight"].add_(1))
    found = verify(model, code=1)
    assert (found["values"][0], found["weights"][0]) == ("ok", "failed")

    def swap(tensors: dict[str, Tensor]) -> None:
        one, two = (f"bert.encoder.layer.{layer}.intermediate.dense.weight" for layer in (0, 1))
        tensors[one], tensors[two] = tensors[two], tensors[one]

    change_weights(model, swap)
    assert "'bert.encoder.layer.0.intermediate.dense.weight'" in verify(model, code=1)["values"][1]


@pytest.mark.parametrize("settings", [
    {}, {"labels": "sampled"}, {"labels": "exact"}, {"mask_placement": "pre", "seed": 3}, {"dtype": "bfloat16"}, {"dtype": "float16"},
    {"dtype": "float64"}, {"estimator": "batch", "batch_size": 5}, {"kind": "diagonal"},
], ids=lambda settings: "-".join(map(str, settings.values())) or "defaults")  # fmt: skip
def test_all_samples_again_give_all_numbers_again(model: Path, settings: dict[str, Any]) -> None:
    path = measure(model, Path("data.jsonl"), **settings)
    found = verify(path, "--recompute", SAMPLES)
    assert found["data"] == ["ok", "the 16 rows drawn from data.jsonl have the stored content hash"]
    assert (found["request"][0], found["numbers"][0]) == ("ok", "ok")
    assert "came out again from all 16 samples" in found["numbers"][1]
    if settings.get("estimator") == "batch":
        assert "single samples prove nothing; take all:  --recompute 16" in refused(path, "--recompute", "15")
    else:
        verdict, detail = verify(path, "--recompute", 3)["numbers"]
        assert verdict == "plausible"
        assert "is below what these 3 of 16 samples alone make of it (correlation with" in detail
        assert detail.endswith("one that is too high would not show. To be sure:  --recompute 16")


def test_grouped_queries_are_measured_again(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "llama", "llama")
    measure(folder, tiny.write_data(tmp_path / "data.jsonl"), samples=4)
    assert verify(folder, "--recompute", 4)["numbers"][0] == "ok"


def test_tensors_that_only_the_loaded_model_has_are_compared_with_it(tmp_path: Path) -> None:
    """Its files hold the experts one by one, the loaded model has them in one."""
    folder = tmp_path / "mixtral"
    (family,) = [one for one in FAMILIES if one.name == "mixtral"]
    compute_checkpoint(build(family), folder, seed=0)
    assert " more are in the loaded model only: compare them with --recompute" in verify(folder)["values"][1]
    assert verify(folder, "--recompute", 6)["numbers"][0] == "ok"
    name = "model.layers.1.mlp.experts.down_proj"
    tampered(folder, lambda made: replace(made, values={**made.values, name: made.values[name] + 1}))
    said = ["failed", f"tensor '{name}' has other values than were stored"]
    assert verify(folder, "--recompute", 6, code=1)["values"] == said


def scale_one(made: Sidecar, factor: float) -> None:
    heads = made.fisher[OUTPUT]["head_fisher"]
    heads[heads.argmax()] *= factor


def swap_two(made: Sidecar) -> None:
    heads = made.fisher[OUTPUT]["head_fisher"]
    order = heads.argsort()
    heads[order[[0, -1]]] = heads[order[[-1, 0]]]


def test_a_changed_number_is_found_among_all_samples(model: Path) -> None:
    for change in (lambda made: scale_one(made, 1.5), lambda made: scale_one(made, 1 / 1.5), swap_two):
        whole = (model / store.BESIDE).read_bytes()
        detail = verify(tampered(model, change), "--recompute", SAMPLES, code=1)["numbers"][1]
        assert f"{OUTPUT}.head_fisher: " in detail
        assert " of 4 numbers; that at [" in detail
        (model / store.BESIDE).write_bytes(whole)


def test_some_samples_refute_what_is_too_low(model: Path) -> None:
    count = SAMPLES - 2
    assert verify(model, "--recompute", count)["numbers"][0] == "plausible"
    whole = (model / store.BESIDE).read_bytes()
    # Too high is not refuted, and the output says that it would not be.
    path = tampered(model, lambda made: scale_one(made, 1.5))
    assert verify(path, "--recompute", count)["numbers"][0] == "plausible"
    for change in (lambda made: scale_one(made, 1 / 1.5), swap_two):
        (model / store.BESIDE).write_bytes(whole)
        verify(tampered(model, change), "--recompute", count, code=1)


def test_another_seeds_numbers_are_refuted(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    theirs = read(measure(other, Path("data.jsonl"), seed=1)).fisher
    path = tampered(model, lambda made: replace(made, fisher=theirs))
    verify(path, "--recompute", SAMPLES, code=1)
    assert " of 48 numbers; " in verify(path, "--recompute", 12, code=1)["numbers"][1]


@pytest.mark.parametrize(("field", "value", "check", "said"), [
    ("loss", 9.0, "numbers", "the loss is stored as 9.000000, measured again it is"),
    ("accuracy", None, "numbers", "the accuracy is stored as nan"),
    ("max_length", 7, "request", "the sidecar says max_length 7, not 40"),
    ("task", "regression", "request", "the sidecar says task regression, not sequence-classification"),
])  # fmt: skip
def test_what_else_it_says_of_the_measurement(
    model: Path, field: str, value: Any, check: str, said: str
) -> None:
    path = tampered(
        model, lambda made: replace(made, metadata=made.metadata.model_copy(update={field: value}))
    )
    found = verify(path, "--recompute", SAMPLES, code=1)
    assert said in found[check][1]
    if check == "request":
        assert found["numbers"] == ["not checked", "nothing was measured: it would not be the same"]


def test_other_rows_are_told_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    other = tiny.write_data(tmp_path / "other.jsonl", rows=40, seed=1)
    found = verify(model, "--recompute", 2, "--data", other, code=1)
    assert "are not those that were measured: their content hash is " in found["data"][1]
    assert found["numbers"][0] == "not checked"
    # Nothing is said against the same rows elsewhere.
    same = shutil.copy("data.jsonl", tmp_path / "same.jsonl")
    assert verify(model, "--recompute", 2, "--data", same)["data"][0] == "ok"
    assert "say where:  --data DATASET" in refused(model, "--recompute", 2, "--data", tmp_path / "none.jsonl")


def test_a_label_map_that_was_not_used_is_told(model: Path) -> None:
    def turn(made: Sidecar) -> Sidecar:
        data = made.metadata.data.model_copy(update={"label_map": {"0": 1, "1": 0}})
        return replace(made, metadata=made.metadata.model_copy(update={"data": data}))

    found = verify(tampered(model, turn), "--recompute", 2, code=1)
    assert found["data"][1].startswith(
        "the sidecar says of its data label_map {'0': 1, '1': 0}, not {'0': 0, '1': 1}"
    )


def test_other_sites_and_parameters_than_the_checkpoints_are_told(model: Path) -> None:
    full = measure(model, Path("data.jsonl"), kind="diagonal", samples=2)

    def rename(metadata: DiagonalMetadata, _: dict[str, Tensor]) -> DiagonalMetadata:
        first, *others = metadata.tensors
        another = first.model_copy(update={"names": (*first.names, "another")})
        return metadata.model_copy(update={"tensors": (another, *others)})

    rewritten(full, rename)
    found = verify(full, "--recompute", 1, code=1)
    assert (
        found["request"][1] == "the sidecar says other parameters than this version finds in the checkpoint"
    )

    def cut(made: Sidecar) -> Sidecar:
        first = made.metadata.sites[:1]
        fisher = {site.output: made.fisher[site.output] for site in first}
        return replace(made, metadata=made.metadata.model_copy(update={"sites": first}), fisher=fisher)

    found = verify(tampered(model, cut), "--recompute", 1, code=1)
    assert (
        found["request"][1] == "the sidecar says other mask nodes than this version finds in the checkpoint"
    )


def test_too_many_samples_and_data_without_measuring_are_refused(model: Path) -> None:
    assert f"is of {SAMPLES} samples" in refused(model, "--recompute", SAMPLES + 1)
    for option in (("--data", "data.jsonl"), ("--batch-tokens", 9), ("--recompute-layers",)):
        assert f"{option[0]} says how to measure again; it goes with --recompute" in refused(model, *option)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "take a smaller --batch-tokens, --recompute-layers, or another --device"),
        ({"estimator": "batch", "batch_size": 8}, "take --recompute-layers, or another --device"),
        ({"kind": "diagonal"}, "take a smaller --batch-tokens, or another --device"),
    ],
)
def test_memory_that_lacks_and_options_that_save_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], advice: str
) -> None:
    path = measure(model, Path("data.jsonl"), **settings)
    tokens = () if "estimator" in settings else ("--batch-tokens", 30)
    layers = () if "kind" in settings else ("--recompute-layers",)
    assert verify(path, "--recompute", SAMPLES, *tokens, *layers)["numbers"][0] == "ok"

    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for home in (measure_mask, measure_diagonal):
        monkeypatch.setattr(home, "measure", full)
    says = f"MeasurementError: the device has too little memory for {model}; {advice}\n"
    assert says in refused(path, "--recompute", SAMPLES)


def test_full_size_sidecars(model: Path, tmp_path: Path) -> None:
    folder = measure(model, Path("data.jsonl"), kind="diagonal", samples=4)
    assert verify(folder).keys() == {"file", "values", "weights"}

    def scale(metadata: DiagonalMetadata, numbers: dict[str, Tensor]) -> DiagonalMetadata:
        numbers["classifier.weight"][0, 0] *= 1.5
        return metadata

    rewritten(folder, scale)
    detail = verify(folder, "--recompute", 4, code=1)["numbers"][1]
    assert "classifier.weight: 1 of 64 numbers; that at [0, 0]" in detail

    def reshape(metadata: DiagonalMetadata, numbers: dict[str, Tensor]) -> DiagonalMetadata:
        numbers["classifier.bias"] = numbers["classifier.bias"].reshape(1, 2)
        shapes = {"shape": (1, 2)}
        records = [
            one.model_copy(update=shapes) if one.names[0] == "classifier.bias" else one
            for one in metadata.tensors
        ]
        return metadata.model_copy(update={"tensors": tuple(records)})

    rewritten(folder, reshape)
    detail = verify(folder, "--recompute", 4, code=1)["numbers"][1]
    assert "classifier.bias: stored as [1, 2], measured again it is [2]" in detail
    rewritten(folder, lambda metadata, _: metadata.model_copy(update={"mean": 2 * metadata.mean}))
    assert "its metadata says that it is" in verify(folder, code=1)["file"][1]
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert verify(alone, code=1)["values"][0] == "not checked"


def test_numbers_that_are_rounding_alone_refute_nothing(model: Path) -> None:
    """The softmax takes a key's bias out: its gradients are what rounding leaves, and other batches round otherwise."""
    folder = measure(model, Path("data.jsonl"), kind="diagonal", samples=8)

    def round_otherwise(metadata: DiagonalMetadata, numbers: dict[str, Tensor]) -> DiagonalMetadata:
        for name, values in numbers.items():
            if name.endswith("self.key.bias"):
                assert float(values.mean()) < 1e-9 * metadata.mean
                values *= torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) * 4
        return metadata

    rewritten(folder, round_otherwise)
    for count in (3, 8):
        assert verify(folder, "--recompute", count)["numbers"][0] == ("ok" if count == 8 else "plausible")


def test_what_could_not_be_replaced_is_measured_again_all_the_same(model: Path, tmp_path: Path) -> None:
    folder = measure(model, Path("data.jsonl"), kind="diagonal", samples=4)
    (folder / "README.md").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        assert verify(path, "--model", model, "--recompute", 4)["numbers"][0] == "ok"


@pytest.mark.parametrize("count", [1, 5, 19, 20])
def test_no_share_of_the_samples_refutes_their_mean(count: int) -> None:
    """Squares with tails as heavy as those of gradients, some of them zero, in float32 as they are kept."""
    generator = torch.Generator().manual_seed(count)
    gradients = torch.randn(20, 500, generator=generator, dtype=torch.float64).pow(5)
    gradients[:, :9] = 0
    noise = torch.randn(gradients.shape, generator=generator, dtype=torch.float64)
    again = gradients * (1 + 1e-5 * noise)
    stored, some = gradients.square().mean(0).float(), again[:count].square().mean(0)
    slack = rounding("float32")
    assert not refuted(stored, some, count / 20, slack).any()
    # What every number may lose before these samples refute it, and what it may gain.
    share = count / 20
    largest = int(some.argmax())
    stored[largest] = 0.99 * share * some[largest]
    assert refuted(stored, some, share, slack).nonzero().flatten().tolist() == [largest]
    stored[largest] = 1.01 * some[largest] if count == 20 else 1e9
    assert bool(refuted(stored, some, share, slack).any()) == (count == 20)
    stored[0] = 1e-3
    assert bool(refuted(stored, some, share, slack)[0]) == (count == 20)


def test_rounding_is_that_of_the_dtype() -> None:
    assert rounding("bfloat16") > 0.05 > 1e-3 > rounding("float32") > rounding("float64") >= 1e-7
