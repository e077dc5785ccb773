"""The merge by full Fisher information against its formula, through mergekit's own interface and commands."""

import json
import os
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.scripts import run_yaml
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner, Result

from fisher_mask_mergekit import diagonal_sidecar, store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.diagonal_sidecar import INDEX, DiagonalSidecar, read_diagonal
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.merging import MergeError
from fisher_mask_mergekit.opening import AnySidecar
from fisher_mask_mergekit.parameter_merge import merge_elements
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.settings import FisherSettings, Kind
from fisher_mask_mergekit.tasks import task_of
from tests import tiny, tiny_tasks
from tests.families import FAMILIES, Fails, Family, Loses, build, sibling
from tests.test_architectures import WITHOUT_TASK, row_for
from tests.test_diagonal_sidecar import made_up, write_for
from tests.test_method import sidecars_read

WEIGHT = "bert.encoder.layer.0.output.dense.weight"


class Inputs:
    """Models with made-up sidecars on disk."""

    def __init__(self, folder: Path, count: int = 2, scale: float = 1.0) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.fishers: list[dict[str, Tensor]] = []
        self.paths: list[str] = []
        for index in range(count):
            model = tiny.classifier("bert", seed=index)
            self.states.append({name: value.clone() for name, value in model.state_dict().items()})
            self.fishers.append(made_up(model, scale, seed=index))
            self.paths.append(str(folder / str(index)))
            write_for(model, Path(self.paths[-1]), self.fishers[-1])

    def merge(self, **parameters: Any) -> dict[str, Tensor]:
        given = {"sidecar": self.paths} | parameters
        return merge_state_dicts(self.states, "fisher_diagonal", parameters=given)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def by_hand(inputs: Inputs, name: str, weights: list[float]) -> Tensor:
    parts = [weight * fisher[name].double() for weight, fisher in zip(weights, inputs.fishers, strict=True)]
    values = [state[name].double() for state in inputs.states]
    return sum(p * v for p, v in zip(parts, values, strict=True)) / sum(parts)  # type: ignore[return-value]


def test_equals_the_formula(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, count=3)
    merged = inputs.merge(weight=[1.0, 0.5, 2.0])
    for name, value in merged.items():
        if value.is_floating_point():
            assert_close(value.double(), by_hand(inputs, name, [1.0, 0.5, 2.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_computes_wide_and_rounds_once(inputs: Inputs, dtype: torch.dtype) -> None:
    states = [{WEIGHT: state[WEIGHT].to(dtype)} for state in inputs.states]
    before = [state[WEIGHT].clone() for state in states]
    merged = merge_state_dicts(states, "fisher_diagonal", parameters={"sidecar": inputs.paths})[WEIGHT]
    assert merged.dtype == dtype
    inputs.states = [{WEIGHT: state[WEIGHT].double()} for state in states]
    precision = torch.finfo(dtype).eps if dtype.itemsize == 2 else 8 * torch.finfo(dtype).eps
    assert_close(merged.double(), by_hand(inputs, WEIGHT, [1.0, 1.0]), rtol=precision, atol=precision * 1e-1)
    assert_close([state[WEIGHT] for state in states], before, rtol=0, atol=0)


def test_the_order_does_not_matter_not_even_to_rounding(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, count=3)
    models = {str(index): state for index, state in enumerate(inputs.states)}
    weights = {"0": 1.0, "1": 0.3, "2": 2.0}
    paths = dict(enumerate(inputs.paths))

    def merged(order: list[int]) -> Tensor:
        return merge_tensors(
            [models[str(index)][WEIGHT] for index in order], "fisher_diagonal", ids=[str(index) for index in order],
            name=WEIGHT, parameters={"sidecar": [paths[i] for i in order], "weight": [weights[str(i)] for i in order]},
        )  # fmt: skip

    assert_close(merged([2, 0, 1]), merged([0, 1, 2]), rtol=0, atol=0)


def test_only_ratios_of_fishers_matter(tmp_path: Path) -> None:
    wanted = Inputs(tmp_path / "one").merge()
    assert_close(Inputs(tmp_path / "two", scale=1e-12).merge(), wanted, rtol=1e-6, atol=1e-7)


def test_a_model_with_itself_gives_itself(inputs: Inputs) -> None:
    inputs.states[1], inputs.paths[1] = inputs.states[0], inputs.paths[0]
    assert_close(inputs.merge(), inputs.states[0], rtol=0, atol=0)


def test_zero_everywhere_is_the_weighted_mean_and_zero_in_one_model_takes_the_other() -> None:
    one, two = torch.randn(4), torch.randn(4)
    fishers = [torch.tensor([0.0, 0.0, 1e-30, 1.0]), torch.tensor([0.0, 1e-30, 0.0, 1.0])]
    for order in ([0, 1], [1, 0]):
        got = merge_elements(
            [[one, two][i] for i in order],
            [[1.0, 3.0][i] for i in order],
            [[1.0, 3.0][i] for i in order],
            lambda number, block, order=order: fishers[order[number]][block],  # type: ignore[misc]
        )
        assert_close(got, torch.stack([(one + 3 * two)[0] / 4, two[1], one[2], (one + 3 * two)[3] / 4]))


def test_huge_weights_do_not_overflow() -> None:
    ones = torch.ones(2)
    got = merge_elements([ones, 0 * ones], [1e308, 1e308], [1e308, 1e308], lambda number, block: ones[block])
    assert_close(got, torch.full((2,), 0.5))


def test_normalize_takes_a_models_own_scale_out(inputs: Inputs) -> None:
    wanted, plain = inputs.merge(normalize="model"), inputs.merge()
    louder = {name: 1000 * value for name, value in inputs.fishers[1].items()}
    write_for(tiny.classifier("bert", seed=1), Path(inputs.paths[1]), louder)
    assert_close(inputs.merge(normalize="model"), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(inputs.merge(), plain, rtol=1e-5, atol=1e-6)
    means = [
        torch.cat([v.flatten() for v in fisher.values()]).double().mean()
        for fisher in (inputs.fishers[0], louder)
    ]
    inputs.fishers = [
        {WEIGHT: fisher[WEIGHT] / mean}
        for fisher, mean in zip((inputs.fishers[0], louder), means, strict=True)
    ]
    assert_close(wanted[WEIGHT].double(), by_hand(inputs, WEIGHT, [1.0, 1.0]), rtol=1e-5, atol=1e-6)


def test_a_mean_that_divides_nothing_is_an_error(inputs: Inputs) -> None:
    folder = Path(inputs.paths[0])
    metadata = read_diagonal(folder).metadata.model_copy(update={"mean": 1e-320})
    (folder / INDEX).write_text(seal(metadata.model_dump_json(), {}))
    with pytest.raises(MergeError, match="mean over all parameters of 1e-320 divides nothing"):
        inputs.merge(normalize="model")


def test_an_index_is_read_once_until_it_is_another(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sidecars_read(monkeypatch)
    inputs.merge()
    inputs.merge()
    assert sorted(paths) == inputs.paths
    index = Path(inputs.paths[1]) / INDEX
    os.utime(index, ns=(0, index.stat().st_mtime_ns + 1))
    inputs.merge()
    assert sorted(paths) == [*inputs.paths, inputs.paths[1]]


def test_the_default_device_does_not_matter(inputs: Inputs) -> None:
    """mergekit's executor for many GPUs makes the thread's GPU torch's default."""
    wanted = inputs.merge()
    with torch.device("meta"):
        got = inputs.merge()
    assert_close(got, wanted, rtol=0, atol=0)


def test_another_checkpoints_sidecar_and_a_stale_one_are_errors(inputs: Inputs) -> None:
    inputs.paths.reverse()
    match = r"SidecarMismatchError at .* has other values\n  Measure this checkpoint:  mergekit-fisher compute 0 --kind"
    with pytest.raises(MergeError, match=match):
        inputs.merge()
    inputs.paths.reverse()
    inputs.states[0] = {
        name: value * 1.01 if value.is_floating_point() else value for name, value in inputs.states[0].items()
    }
    with pytest.raises(MergeError, match="has other values"):
        inputs.merge()


def test_a_tensor_that_the_sidecar_does_not_know_is_never_averaged(inputs: Inputs) -> None:
    values = [torch.randn(3), torch.randn(3)]
    with pytest.raises(MergeError, match=r"it knows no tensor 'experts\.0\.weight'"):
        merge_tensors(
            values, "fisher_diagonal", name="experts.0.weight", parameters={"sidecar": inputs.paths}
        )


def test_a_moved_layer_gets_its_own_fisher(inputs: Inputs) -> None:
    source = WEIGHT.replace("layer.0", "layer.1")
    for name in (WEIGHT, WEIGHT.replace("layer.0", "layer.9")):
        given = {"sidecar": inputs.paths}
        got = merge_tensors(
            [s[source] for s in inputs.states], "fisher_diagonal", name=name, parameters=given
        )
        assert_close(got.double(), by_hand(inputs, source, [1.0, 1.0]), rtol=1e-5, atol=1e-6)


def test_a_missing_sidecar_or_shard_is_an_error(inputs: Inputs) -> None:
    with pytest.raises(
        MergeError, match=r"there is no sidecar for 1\. Measure it:  mergekit-fisher compute 1 --kind d"
    ):
        inputs.merge(sidecar=[inputs.paths[0], ""])
    plain = merge_state_dicts(inputs.states, "linear", parameters={"weight": 1.0})
    assert_close(inputs.merge(sidecar=[inputs.paths[0], ""], missing="average"), plain)
    (Path(inputs.paths[1]) / "diagonal_fisher-00001-of-00001.safetensors").unlink()
    for missing in ("error", "average"):
        with pytest.raises(
            MergeError, match=r"SidecarError at .*lacks diagonal_fisher-00001-of-00001.safetensors"
        ):
            inputs.merge(missing=missing)


def test_weights_that_cannot_be_and_a_single_model(inputs: Inputs) -> None:
    with pytest.raises(MergeError, match="weight of 0 is"):
        inputs.merge(weight=[-1.0, 1.0])
    with pytest.raises(MergeError, match="every model has weight 0"):
        inputs.merge(weight=0.0)
    assert_close(inputs.merge(weight=[0.0, 0.7], sidecar=["", ""]), inputs.states[1], rtol=0, atol=0)


# From here on through the commands.


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def mergekit(recipe: Path, out: Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(run_yaml.main, [str(recipe), str(out), "--no-copy-tokenizer"])


def write_recipe(
    folder: Path, models: list[Path], data: Path, method: str = "fisher_diagonal", **more: Any
) -> Path:
    recipe = folder / "recipe.yml"
    entries = [
        {"model": str(model), "fisher": {"data": str(data)}, "parameters": {"weight": 1.0}}
        for model in models
    ]
    document = {"merge_method": method, "models": entries, "base_model": str(models[0]), "dtype": "float32"}
    recipe.write_text(yaml.safe_dump(document | more))
    return recipe


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    one = tiny.checkpoint(tmp_path / "one")
    return [one, tiny.sibling(tmp_path / "two", one, seed=1)]


def test_compute_measures_what_the_recipes_method_goes_by(
    tmp_path: Path, models: list[Path], data: Path
) -> None:
    out = run("compute", write_recipe(tmp_path, models, data)).stdout
    for model in models:
        assert f"{model}: 24 samples, " in out
        assert not (model / store.BESIDE).exists()
        metadata = read_diagonal(model / store.DIAGONAL_BESIDE).metadata
        assert (metadata.settings.kind, metadata.samples, metadata.checkpoint) == ("diagonal", 24, str(model))
    assert out.count(str(store.DIAGONAL_BESIDE)) == 2
    assert run("compute", tmp_path / "recipe.yml").stdout.count("measured before") == 2
    # One option away, and each kind in its place.
    assert "measured before" not in run("compute", tmp_path / "recipe.yml", "--kind", "mask").stdout
    assert all((model / store.BESIDE).is_file() for model in models)
    write_recipe(tmp_path, models, data, "fisher_mask")
    assert run("compute", tmp_path / "recipe.yml").stdout.count("measured before") == 2
    assert run("compute", tmp_path / "recipe.yml", "--kind", "diagonal").stdout.count("measured before") == 2
    write_recipe(tmp_path, models, data, "fisher_mask", fisher={"kind": "diagonal"})
    assert run("compute", tmp_path / "recipe.yml").stdout.count("measured before") == 2


def test_the_same_request_is_served_and_another_or_a_broken_one_is_measured(
    models: list[Path], data: Path
) -> None:
    def again(*options: str) -> bool:
        given = ["--kind", "diagonal", "--samples", "6", *options]
        return "measured before" in run("compute", models[0], "--data", data, *given).stdout

    folder = models[0] / store.DIAGONAL_BESIDE
    assert not again()
    assert again()
    assert not again("--force")
    assert not again("--labels", "exact")
    next(folder.glob("*.safetensors")).unlink()
    assert not again("--labels", "exact")
    (folder / "notes.txt").write_text("mine")
    result = run("compute", models[0], "--data", data, "--kind", "diagonal", code=1)
    assert f"{folder} exists and is no sidecar; it was left as it is" in result.stderr


def test_where_it_goes(
    tmp_path: Path, models: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str | Path] = [
        "compute", models[0], "--data", data, "--kind", "diagonal", "--samples", "4"
    ]  # fmt: skip
    run(*given, "--out", tmp_path / "chosen")
    assert (tmp_path / "chosen" / INDEX).is_file()
    monkeypatch.setattr(store.os, "access", lambda path, mode: False)
    assert str(tmp_path / "cache") in run(*given).stdout
    # What the recipe's sidecar names is of the kind that its method reads.
    entry = {
        "model": str(models[0]),
        "fisher": {"data": str(data)},
        "parameters": {"sidecar": str(tmp_path / "s")},
    }
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "fisher_mask", "models": [entry]}))
    run("compute", recipe, "--kind", "diagonal", "--samples", "5")
    assert not (tmp_path / "s").exists()
    run("compute", recipe, "--samples", "5")
    assert (tmp_path / "s").is_file()


@pytest.mark.parametrize("option", [("--estimator", "batch"), ("--mask-placement", "pre")])
def test_settings_of_masks_are_refused(models: list[Path], data: Path, option: tuple[str, str]) -> None:
    result = run("compute", models[0], "--data", data, "--kind", "diagonal", *option, code=1)
    assert (
        "kind 'diagonal' has no masks, and squares no batch's gradients; it takes estimator sample and mask_placement post"
        in result.stderr
    )


def test_a_recipe_from_data_to_merge(
    tmp_path: Path, models: list[Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagonal_sidecar, "SHARD_BYTES", 20_000)
    recipe = write_recipe(tmp_path, models, data)
    refused = mergekit(recipe, tmp_path / "merged")
    assert f"Measure it:  mergekit-fisher compute {recipe}" in refused.output
    run("compute", recipe)
    done = mergekit(recipe, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    next((models[1] / store.DIAGONAL_BESIDE).glob("*-00002-of-*")).unlink()
    broken = mergekit(recipe, tmp_path / "again")
    assert broken.exit_code == 1
    assert "Error: SidecarError at" in broken.output
    assert "lacks diagonal_fisher-00002-of-" in broken.output


def test_a_layout_that_is_not_supported_is_one_error_before_anything_is_measured(
    tmp_path: Path, data: Path
) -> None:
    """In the files, what is three projections in memory is one."""
    model = build(next(family for family in FAMILIES if family.name == "nomic-bert"))
    folder = tiny.save(model, tmp_path / "nomic")
    with pytest.raises(
        CheckpointError, match=r"does not support its layout: its files hold .*Wqkv.weight \[96, 32\]"
    ):
        prepare(str(folder), FisherSettings(data=str(data), kind="diagonal"))


def measured(model: Any, folder: Path, seed: int, kind: Kind = "diagonal") -> AnySidecar:
    """A checkpoint, measured on text of its own."""
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    data = folder.with_suffix(".jsonl")
    draw = tiny_tasks.Draw(seed)
    rows = [row_for(task_of(model.config, "it", FisherSettings()).name, draw) for _ in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = FisherSettings(data=str(data), batch_size=2, kind=kind)
    return compute(prepare(str(folder), settings), torch.device("cpu")).sidecar


MERGED = [
    family
    for family in FAMILIES
    if family.name not in WITHOUT_TASK and family.name != "nomic-bert" and not isinstance(family.merge, Fails)
]


@pytest.mark.parametrize("family", MERGED, ids=str)
def test_a_merge_through_mergekit(family: Family, tmp_path: Path) -> None:
    parent = build(family)
    models = [sibling(parent, seed) for seed in (1, 2)]
    folders = [tmp_path / "one", tmp_path / "two"]
    sidecars = [
        measured(model, folder, seed)
        for seed, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]
    recipe = write_recipe(tmp_path, folders, tmp_path / "none")
    result = mergekit(recipe, tmp_path / "merged")
    assert result.exit_code == 0, result.output or result.exception
    merged, report = type(parent).from_pretrained(tmp_path / "merged", output_loading_info=True)
    lost = family.merge.parts if isinstance(family.merge, Loses) else ()
    assert bool(report["missing_keys"]) == bool(lost)
    states = [dict(model.named_parameters()) for model in models]
    moved = 0
    for name, value in merged.named_parameters():
        if name in report["missing_keys"] or any(part in name for part in lost):
            continue
        fishers = [
            sidecar.fisher(sidecar.records[name]).double()
            for sidecar in sidecars
            if isinstance(sidecar, DiagonalSidecar)
        ]
        one, two = (state[name].double() for state in states)
        fishers = [torch.where(fishers[0] + fishers[1] > 0, fisher, 1.0) for fisher in fishers]
        wanted = (fishers[0] * one + fishers[1] * two) / (fishers[0] + fishers[1])
        assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
        moved += bool(((wanted - (one + two) / 2).abs() > 1e-3).any())
    assert moved
