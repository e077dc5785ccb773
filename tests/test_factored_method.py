"""The merge by rows and columns of all parameters, through mergekit's own interface and commands."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit import store
from fisher_mask_mergekit.errors import SidecarError
from fisher_mask_mergekit.factored_sidecar import read_factored
from fisher_mask_mergekit.merging import MergeError
from fisher_mask_mergekit.sidecar import read
from tests import tiny
from tests.families import build, sibling
from tests.test_diagonal import family_named
from tests.test_diagonal_method import Inputs as DiagonalInputs
from tests.test_diagonal_method import measured, mergekit, run, write_recipe
from tests.test_diagonal_sidecar import made_up
from tests.test_factored_sidecar import WEIGHT, WORDS, rank_one, write_for

ALL = {"nodes": "all"}


class Inputs:
    """Models with made-up sidecars on disk."""

    def __init__(self, folder: Path, count: int = 2, scale: float = 1.0, zeros: int = 0) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.fishers: list[dict[str, Tensor]] = []
        self.paths: list[str] = []
        folder.mkdir(exist_ok=True)
        for index in range(count):
            model = tiny.classifier("bert", seed=index)
            fisher = made_up(model, scale, seed=index)
            for value in fisher.values():
                value[:zeros] = 0
            self.states.append({name: value.clone() for name, value in model.state_dict().items()})
            self.fishers.append(fisher)
            self.paths.append(str(folder / f"{index}.safetensors"))
            write_for(model, Path(self.paths[-1]), fisher)

    def merge(self, **parameters: Any) -> dict[str, Tensor]:
        given = ALL | {"sidecar": self.paths} | parameters
        return merge_state_dicts(self.states, "fisher_mask", parameters=given)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def by_hand(inputs: Inputs, name: str, coefficients: list[float]) -> Tensor:
    parts = [c * rank_one(fisher[name]) for c, fisher in zip(coefficients, inputs.fishers, strict=True)]
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
    inputs.states = [{WEIGHT: state[WEIGHT].to(dtype)} for state in inputs.states]
    before = [state[WEIGHT].clone() for state in inputs.states]
    merged = inputs.merge()[WEIGHT]
    assert merged.dtype == dtype
    precision = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    assert_close(merged.double(), by_hand(inputs, WEIGHT, [1.0, 1.0]), rtol=precision, atol=precision * 1e-1)
    assert_close([state[WEIGHT] for state in inputs.states], before, rtol=0, atol=0)


@pytest.mark.parametrize("normalize", ["model", "tensor"])
def test_normalize_takes_a_models_own_scale_out(tmp_path: Path, normalize: str) -> None:
    inputs = Inputs(tmp_path / "one")
    louder = Inputs(tmp_path / "two", scale=1000.0)
    inputs.paths[1], inputs.fishers[1] = louder.paths[1], louder.fishers[1]
    merged = inputs.merge(normalize=normalize)
    means = [
        torch.cat([v.flatten() for v in (fisher.values() if normalize == "model" else [fisher[WEIGHT]])])
        for fisher in inputs.fishers
    ]
    wanted = by_hand(inputs, WEIGHT, [1 / float(one.double().mean()) for one in means])
    assert_close(merged[WEIGHT].double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_full_diagonal_can_be_normalized_by_tensor_too(tmp_path: Path) -> None:
    inputs = DiagonalInputs(tmp_path)
    merged = inputs.merge(normalize="tensor")
    for name in (WEIGHT, WORDS):
        parts = [fisher[name].double() / fisher[name].double().mean() for fisher in inputs.fishers]
        one, two = (state[name].double() for state in inputs.states)
        assert_close(
            merged[name].double(), (parts[0] * one + parts[1] * two) / sum(parts), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scale", [1e-36, 1e30])
def test_only_ratios_matter_however_small_or_large(tmp_path: Path, scale: float) -> None:
    wanted = Inputs(tmp_path / "one").merge()
    assert_close(Inputs(tmp_path / "two", scale=scale).merge(), wanted, rtol=1e-5, atol=1e-6)


def test_a_model_with_itself_gives_itself(inputs: Inputs) -> None:
    inputs.states[1], inputs.paths[1] = inputs.states[0], inputs.paths[0]
    assert_close(inputs.merge(weight=[1.0, 0.3]), inputs.states[0], rtol=0, atol=0)


def test_what_is_zero_in_all_is_the_mean_by_weight_and_zero_in_one_takes_the_other(tmp_path: Path) -> None:
    """Rows of an embedding that no sample reads."""
    none = Inputs(tmp_path / "none", zeros=3)
    got = none.merge(weight=[1.0, 3.0])[WORDS]
    one, two = (state[WORDS] for state in none.states)
    assert_close(got[:3], (one[:3] + 3 * two[:3]) / 4, rtol=1e-5, atol=1e-6)
    assert_close(got[3:].double(), by_hand(none, WORDS, [1.0, 3.0])[3:], rtol=1e-5, atol=1e-6)
    full = Inputs(tmp_path / "full")
    full.paths[0] = none.paths[0]
    assert_close(full.merge()[WORDS][:3], full.states[1][WORDS][:3], rtol=0, atol=0)


def test_a_moved_layer_gets_its_own(inputs: Inputs) -> None:
    source = WEIGHT.replace("layer.0", "layer.1")
    got = merge_tensors(
        [s[source] for s in inputs.states],
        "fisher_mask",
        name=WEIGHT,
        parameters=ALL | {"sidecar": inputs.paths},
    )
    assert_close(got.double(), by_hand(inputs, source, [1.0, 1.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("parameters", "says"), [
    ({"unmasked": "layer"}, "unmasked: layer is about tensors without mask nodes; nodes: all leaves none"),
    ({"normalize": "layer"}, "normalize: layer is about sites of masks; nodes: all takes none, model or tensor"),
    ({"values": True}, "values: true is about masks; nodes: all weighs the values, too, as it is"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(inputs: Inputs, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(MergeError, match=says):
        inputs.merge(**parameters)


def test_a_missing_or_foreign_sidecar_is_an_error(inputs: Inputs) -> None:
    match = (
        r"there is no sidecar for 1\. Measure it:  mergekit-fisher compute 1 --kind factored --data DATASET"
    )
    with pytest.raises(MergeError, match=match):
        inputs.merge(sidecar=[inputs.paths[0], ""])
    plain = merge_state_dicts(inputs.states, "linear", parameters={"weight": 1.0})
    assert_close(inputs.merge(sidecar=[inputs.paths[0], ""], missing="average"), plain)
    inputs.paths.reverse()
    with pytest.raises(MergeError, match=r"has other values\n  Measure this checkpoint:  .* --kind factored"):
        inputs.merge()


# From here on through the commands.


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    one = tiny.checkpoint(tmp_path / "one")
    return [one, tiny.sibling(tmp_path / "two", one, seed=1)]


def test_a_recipe_from_data_to_merge(tmp_path: Path, models: list[Path]) -> None:
    data = tiny.write_data(tmp_path / "data.jsonl")
    recipe = write_recipe(
        tmp_path, models, data, "fisher_mask", parameters=ALL | {"normalize": "tensor"}, fisher={"samples": 6}
    )
    assert f"Measure it:  mergekit-fisher compute {recipe}" in mergekit(recipe, tmp_path / "merged").output
    assert "there is none for" in run("check", recipe, code=1).stdout
    out = run("compute", recipe).stdout
    assert out.count(str(store.FACTORED_BESIDE)) == 2
    assert run("compute", recipe).stdout.count("measured before") == 2
    run("check", recipe)
    done = mergekit(recipe, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    states = [load_file(model / "model.safetensors") for model in models]
    sidecars = [read_factored(model / store.FACTORED_BESIDE) for model in models]
    for name, value in merged.items():
        parts = []
        for sidecar in sidecars:
            fisher = sidecar.fisher(sidecar.records[name])
            parts.append(fisher / fisher.mean().clamp(min=1e-300))
        shares = torch.stack(parts) / sum(parts)
        shares = torch.where(shares.isnan(), 0.5, shares)
        wanted = sum(share * state[name] for share, state in zip(shares, states, strict=True))
        assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_other_commands_say_what_they_do_with_it(tmp_path: Path, models: list[Path]) -> None:
    data = tiny.write_data(tmp_path / "data.jsonl")
    recipe = write_recipe(tmp_path, models, data, "fisher_mask", parameters=ALL, fisher={"samples": 6})
    run("compute", recipe)
    file = models[0] / store.FACTORED_BESIDE
    for count in ("6", "3"):
        checks = run("verify", file, "--recompute", count).stdout
        assert "numbers" in checks
        assert "failed" not in checks
    assert "every parameter, by rows and columns: " in run("inspect", file).stdout
    drawn = run("inspect", file, "--html", tmp_path / "page.html", code=1).stderr
    assert f"{file} is of kind factored: it has no mask nodes to draw; leave out --html and --png" in drawn
    assert "nodes: all has no mask nodes to show" in run("inspect", recipe, code=1).stderr
    assert "has no mask nodes" in run("push", file, "--repo", "a/b", code=1).stderr
    assert (
        f"{file} is a sidecar of rows and columns" in run("push", models[0], "--repo", "a/b", code=1).stderr
    )
    assert run("inspect", models[0]).stdout == run("inspect", file).stdout
    with pytest.raises(SidecarError, match="is a sidecar of rows and columns, which fisher_mask takes with"):
        read(file)
    refused = run("compute", models[0], "--data", data, "--kind", "factored", "--estimator", "batch", code=1)
    assert "kind 'factored' has no masks, and squares no batch's gradients" in refused.stderr
    assert "it takes estimator sample or token and mask_placement post" in refused.stderr
    refused = run("compute", models[0], "--data", data, "--estimator", "token", code=1)
    assert "estimator 'token' is about matrices; kind 'mask' takes sample or batch" in refused.stderr
    run(
        "compute",
        models[0],
        "--data",
        data,
        "--kind",
        "factored",
        "--estimator",
        "token",
        "--out",
        tmp_path / "t.safetensors",
    )
    assert read_factored(tmp_path / "t.safetensors").metadata.settings.estimator == "token"
    refused = run("compute", models[0], "--data", data, "--kind", "factored", "--dtype", "float16", code=1)
    assert "kind 'factored' squares gradients before it is known whether a batch overflows" in refused.stderr
    refused = run("compute", models[0], "--data", data, "--kind", "factored", "--recompute", code=1)
    assert "kind 'factored' keeps what every module is given" in refused.stderr
    (tmp_path / "mine.safetensors").write_text("mine")
    out: list[str | Path] = ["--kind", "factored", "--out", tmp_path / "mine.safetensors"]
    assert "exists and is no sidecar" in run("compute", models[0], "--data", data, *out, code=1).stderr
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_a_recipe_with_nodes_for_some_tensors_only_is_refused(tmp_path: Path, models: list[Path]) -> None:
    sources = [{"model": str(model), "layer_range": [0, 1]} for model in models]
    slices = [{"sources": sources, "parameters": ALL}, {"sources": sources}]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "fisher_mask", "slices": slices}))
    assert "nodes: all holds for some tensors only" in run("compute", recipe, code=1).stderr
    filtered = [{"filter": "attention", "value": "all"}, {"value": "paper"}]
    recipe = write_recipe(tmp_path, models, tmp_path / "none", "fisher_mask", parameters={"nodes": filtered})
    said = "nodes: expected one of paper, columns, all for all tensors alike, got [{'filter': 'attention'"
    assert said in run("compute", recipe, code=1).stderr
    assert said in run("check", recipe, code=1).stdout


@pytest.mark.parametrize("method", ["fisher_mask", "fisher_diagonal"])
def test_a_wrong_value_is_one_line_of_mergekits_command(
    method: str, tmp_path: Path, models: list[Path]
) -> None:
    for name, value in (("nodes", "al"), ("normalize", "layers"), ("weight", "much"), ("missing", 3)):
        if (name, method) == ("nodes", "fisher_diagonal"):
            continue
        recipe = write_recipe(tmp_path, models, tmp_path / "none", method, parameters={name: value})
        if name == "weight":
            recipe.write_text(recipe.read_text().replace("weight: 1.0", "weight: much"))
        result = mergekit(recipe, tmp_path / "merged")
        assert isinstance(result.exception, SystemExit)  # No traceback.
        said = result.output.splitlines()[-1]
        assert said.startswith(f"Error: RecipeError: {name}: Input should be ")
        assert said.endswith(f", got {value!r}")
        assert f"{name}: " in run("check", recipe, code=1).stdout
        assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b-untied", "mixtral", "llama-tied"])
def test_a_merge_through_mergekit_of_other_layouts(name: str, tmp_path: Path) -> None:
    """Pieces of parameters in the files, experts, and tied weights."""
    parent = build(family_named(name))
    models = [sibling(parent, seed) for seed in (1, 2)]
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, (model, folder) in enumerate(zip(models, folders, strict=True)):
        measured(model, folder, seed, kind="factored")
    recipe = write_recipe(tmp_path, folders, tmp_path / "none", "fisher_mask", parameters=ALL)
    result = mergekit(recipe, tmp_path / "merged")
    assert result.exit_code == 0, result.output or result.exception
    merged = type(parent).from_pretrained(tmp_path / "merged")
    sidecars = [read_factored(folder / store.FACTORED_BESIDE) for folder in folders]
    states = [dict(model.named_parameters()) for model in models]
    moved = 0
    for part, value in merged.named_parameters():
        fishers = [sidecar.fisher(sidecar.records[part]) for sidecar in sidecars]
        one, two = (state[part].double() for state in states)
        fishers = [torch.where(fishers[0] + fishers[1] > 0, fisher, 1.0) for fisher in fishers]
        wanted = (fishers[0] * one + fishers[1] * two) / (fishers[0] + fishers[1])
        assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
        moved += bool(((wanted - (one + two) / 2).abs() > 1e-3).any())
    assert moved
