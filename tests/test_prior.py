"""Merges from the models' parent, through mergekit's own interface and commands."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.diagonal_sidecar import INDEX, read_diagonal
from fisher_mask_mergekit.factored_sidecar import read_factored, write_factored
from fisher_mask_mergekit.merging import MergeError
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.sidecar import write
from fisher_mask_mergekit.weighting import merge_rows, steps
from tests import tiny
from tests.test_diagonal_method import Inputs as DiagonalInputs
from tests.test_diagonal_method import mergekit, run, write_recipe
from tests.test_factored_method import Inputs as FactoredInputs
from tests.test_factored_sidecar import rank_one
from tests.test_method import PAPER
from tests.test_method import Inputs as MaskInputs

WEIGHTS = [1.0, 0.5, 2.0]
AnyInputs = MaskInputs | DiagonalInputs | FactoredInputs
METHODS: dict[str, tuple[type[AnyInputs], str, dict[str, Any]]] = {
    "mask": (MaskInputs, "fisher_mask", {}),
    "factored": (FactoredInputs, "fisher_mask", {"nodes": "all"}),
    "diagonal": (DiagonalInputs, "fisher_diagonal", {}),
}


def keyed(models: list[Any], parent: Any) -> dict[object, Any]:
    found: dict[object, Any] = dict(enumerate(models))
    return found | {"parent": parent}


class Descendants:
    """Three models with made-up sidecars of a kind, and a parent."""

    def __init__(self, folder: Path, kind: str) -> None:
        made, self.method, self.parameters = METHODS[kind]
        self.inputs = made(folder, count=3)
        self.parent = {
            name: value.clone() for name, value in tiny.classifier("bert", seed=9).state_dict().items()
        }

    def states(self) -> dict[object, dict[str, Tensor]]:
        return keyed(self.inputs.states, self.parent)

    def merge(self, dtype: torch.dtype | None = None, **given: Any) -> dict[str, Tensor]:
        """With ``sidecar`` and ``weight`` for the models alone."""
        weight = given.pop("weight", [1.0] * 3)
        sidecar = given.pop("sidecar", self.inputs.paths)
        states = self.states()
        parameters = {
            "normalize": "tensor", **self.parameters, **given,
            "weight": keyed(weight, given.pop("base_weight", None)), "sidecar": keyed(sidecar, ""),
        }  # fmt: skip
        parameters.pop("base_weight", None)
        return merge_state_dicts(states, self.method, parameters=parameters, base="parent", dtype=dtype)

    def fisher(self, index: int, name: str) -> Tensor:
        """Element by element, with the mean 1; all 1 where nothing is measured. float64."""
        value = torch.ones_like(self.inputs.states[index][name], dtype=torch.float64)
        if isinstance(self.inputs, MaskInputs):
            sidecar = self.inputs.sidecars[index]
            for pattern, (node, axis) in PAPER.items():
                if re.search(pattern, name):
                    vector = sidecar.fisher[sidecar.governed[name][0].output][node].double()
                    rows = vector.repeat_interleave(value.shape[axis] // len(vector))
                    value = value * rows.reshape(-1, *[1] * (value.ndim - 1))
        elif isinstance(self.inputs, FactoredInputs):
            value = rank_one(self.inputs.fishers[index][name]).double()
        else:
            value = self.inputs.fishers[index][name].double()
        return value / value.mean()

    def by_hand(self, name: str, prior: float, weights: list[float]) -> Tensor:
        """The product of three normal distributions over the parent's own twice, written out."""
        start = self.parent[name].double()
        top, bottom = -2 * prior * start, -2 * prior * torch.ones_like(start)
        for index, weight in enumerate(weights):
            fisher = weight * len(weights) / sum(weights) * self.fisher(index, name)
            share = weight * len(weights) / sum(weights) * prior
            top = top + (share + fisher) * self.inputs.states[index][name].double()
            bottom = bottom + share + fisher
        return top / bottom


@pytest.fixture(params=METHODS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Descendants:
    return Descendants(tmp_path, request.param)


@pytest.mark.parametrize("prior", [0.2, 1.0, 30.0])
def test_equals_the_product_of_normal_distributions(models: Descendants, prior: float) -> None:
    merged = models.merge(prior=prior, weight=WEIGHTS)
    for name, value in merged.items():
        if value.is_floating_point():
            assert_close(value.double(), models.by_hand(name, prior, WEIGHTS), rtol=1e-4, atol=1e-5)


def test_it_lies_between_the_mean_and_the_sum_of_all_changes(models: Descendants) -> None:
    plain = models.merge(weight=WEIGHTS)
    assert_close(models.merge(prior=1e-9, weight=WEIGHTS), plain, rtol=1e-4, atol=1e-5)
    total = merge_state_dicts(
        models.states(), "task_arithmetic",
        parameters={"weight": keyed([6 / 7, 3 / 7, 12 / 7], None), "normalize": False}, base="parent",
    )  # fmt: skip
    assert_close(models.merge(prior=1e9, weight=WEIGHTS), total, rtol=1e-4, atol=1e-5)


def test_only_ratios_of_weights_count_and_one_model_is_taken_as_it_is(models: Descendants) -> None:
    merged = models.merge(prior=1.0, weight=WEIGHTS)
    assert_close(models.merge(prior=1.0, weight=[7 * one for one in WEIGHTS]), merged, rtol=1e-5, atol=1e-6)
    alone = models.merge(prior=1.0, weight=[0.0, 0.3, 0.0], sidecar=[""] * 3)
    assert_close(alone, models.inputs.states[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_computes_wide_and_rounds_once(models: Descendants, dtype: torch.dtype) -> None:
    models.inputs.states = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        for state in models.inputs.states
    ]
    models.parent = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in models.parent.items()
    }
    before = [value.clone() for value in models.parent.values()]
    merged = models.merge(prior=1.0)
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for name, value in merged.items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert_close(value.double(), models.by_hand(name, 1.0, [1.0] * 3), rtol=near, atol=near)
    assert_close(list(models.parent.values()), before, rtol=0, atol=0)


@pytest.mark.parametrize("prior", [1.0, 30.0])
def test_clipped_no_element_leaves_the_range_of_the_parent_and_the_models(
    models: Descendants, prior: float
) -> None:
    free, merged = (models.merge(prior=prior, weight=WEIGHTS, clip=clip) for clip in (False, True))
    beyond = 0
    for name, value in merged.items():
        if value.is_floating_point():
            values = torch.stack([models.parent[name], *(state[name] for state in models.inputs.states)])
            wanted = torch.minimum(torch.maximum(free[name], values.amin(0)), values.amax(0))
            assert_close(value, wanted, rtol=0, atol=0)
            beyond += int((value != free[name]).sum())
    assert beyond > 100
    plain = [models.merge(weight=WEIGHTS, clip=clip) for clip in (False, True)]
    assert_close(plain[0], plain[1], rtol=0, atol=0)


def test_clipped_a_model_merged_with_copies_of_itself_is_left_as_it_is(models: Descendants) -> None:
    models.inputs.states = [models.inputs.states[0]] * 3
    given: dict[str, Any] = {"sidecar": [models.inputs.paths[0]] * 3, "prior": 3.0}
    own = models.inputs.states[0]
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert float((models.merge(**given)[name] - own[name]).abs().max()) > 0.01
    assert_close(models.merge(**given, clip=True), own, rtol=0, atol=0)


def test_clipped_in_half_precision(models: Descendants) -> None:
    states = [*models.inputs.states, models.parent]
    halves = [{name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()} for state in states]  # fmt: skip
    models.inputs.states, models.parent = halves[:3], halves[3]
    for name, value in models.merge(prior=3.0, clip=True).items():
        if value.is_floating_point():
            values = torch.stack([state[name] for state in halves])
            assert value.dtype == torch.bfloat16
            assert bool((value >= values.amin(0)).all())
            assert bool((value <= values.amax(0)).all())


def test_without_sidecars_all_count_alike(models: Descendants) -> None:
    merged = models.merge(prior=1.0, sidecar=[models.inputs.paths[0], "", ""], missing="average")
    for name, value in merged.items():
        if value.is_floating_point():
            changes = [state[name] - models.parent[name] for state in models.inputs.states]
            assert_close(value, models.parent[name] + torch.stack(changes).sum(0) / 2, rtol=1e-4, atol=1e-5)


def test_rows_that_matter_to_no_model_get_all_changes_and_those_of_one_its_own() -> None:
    fishers = [torch.tensor([0.0, 1e12]), torch.tensor([0.0, 0.0])]
    assert_close(
        steps([1.0, 1.0], fishers, 1.0), torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double(), atol=1e-9, rtol=0
    )
    assert_close(steps([1e308, 1e308], None, 1.0), torch.full((2,), 2 / 3).double())
    assert_close(merge_rows([torch.tensor(1.0), torch.tensor(4.0)], [1.0, 1.0]), torch.tensor(2.5))


@pytest.mark.parametrize(("given", "says"), [
    ({"normalize": "none"}, "prior: 1.0 counts in means of each model's Fisher information, so it needs normalize: tensor"),
    ({"prior": -1.0}, "prior is -1.0; expected a number of 0 or more"),
    ({"prior": float("nan")}, "prior is nan; expected a number of 0 or more"),
    ({"prior": float("inf")}, "prior is inf; expected a number of 0 or more"),
    ({"prior": 1e39}, "prior is 1e+39; expected 0, or 1e-30 to 1e+30"),
    ({"prior": 1e-46}, "prior is 1e-46; expected 0, or 1e-30 to 1e+30"),
    ({"prior": "much"}, "prior: Input should be a valid number, unable to parse string as a number, got 'much'"),
    ({"base_weight": 1.0}, "base_model parent has a weight; with prior it is what the models were fine-tuned from"),
])  # fmt: skip
def test_what_cannot_be_is_one_error(models: Descendants, given: dict[str, Any], says: str) -> None:
    with pytest.raises(MergeError, match=re.escape(says)):
        models.merge(**{"prior": 1.0, **given})


def test_a_mean_that_is_next_to_nothing_is_an_error(tmp_path: Path) -> None:
    models = Descendants(tmp_path, "diagonal")
    models.inputs = DiagonalInputs(tmp_path / "small", count=3, scale=1e-40)
    with pytest.raises(MergeError, match=r"a mean over this tensor of .*e-\d+ divides nothing"):
        models.merge(prior=1.0)


def forge_mean(path: Path, mean: float) -> None:
    """Give a sidecar of all parameters another mean over them, and a checksum that fits."""
    if path.is_dir():
        index = read_diagonal(path).metadata.model_copy(update={"mean": mean})
        (path / INDEX).write_text(seal(index.model_dump_json(), {}))
    else:
        sidecar = read_factored(path)
        write_factored(replace(sidecar, metadata=sidecar.metadata.model_copy(update={"mean": mean})), path)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("mean", [1e-30, 1e-36])
@pytest.mark.parametrize("kind", ["factored", "diagonal"])
def test_a_mean_that_is_not_that_of_the_numbers_is_an_error_and_no_nan(
    tmp_path: Path, kind: str, mean: float, clip: bool
) -> None:
    models = Descendants(tmp_path, kind)
    models.inputs = type(models.inputs)(tmp_path / "large", count=3, scale=1e4)
    forge_mean(Path(models.inputs.paths[1]), mean)
    says = rf"SidecarError at bert\..*: {models.inputs.paths[1]}: Fisher information of .* times its mean is more than can be"
    with pytest.raises(MergeError, match=says):
        models.merge(prior=1.0, normalize="model", clip=clip)
    forge_mean(Path(models.inputs.paths[1]), 1e36)
    assert all(bool(value.isfinite().all()) for value in models.merge(prior=1.0, normalize="model").values())


@pytest.mark.parametrize("kind", ["factored", "diagonal"])
def test_the_least_prior_adds_up_what_matters_to_no_model(tmp_path: Path, kind: str) -> None:
    models = Descendants(tmp_path, kind)
    models.inputs = type(models.inputs)(tmp_path / "zero", count=3, scale=0.0)
    merged = models.merge(prior=1e-30)
    for name, value in merged.items():
        if value.is_floating_point():
            changes = [state[name] - models.parent[name] for state in models.inputs.states]
            assert_close(value, models.parent[name] + torch.stack(changes).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["model", "layer", "tensor"])
def test_masks_go_by_means_of_their_own_however_large_or_small(tmp_path: Path, normalize: str) -> None:
    models = Descendants(tmp_path, "mask")
    assert isinstance(models.inputs, MaskInputs)
    for path, sidecar, value in zip(
        models.inputs.paths, models.inputs.sidecars, (3e38, 1e-45, 0.0), strict=True
    ):
        for vectors in sidecar.fisher.values():
            for vector in vectors.values():
                vector.fill_(value)[:1] = 1e-45
        write(sidecar, Path(path))
    for prior in (0.0, 1e-30, 1.0, 1e30):
        merged = models.merge(normalize=normalize, prior=prior)
        assert all(bool(value.isfinite().all()) for value in merged.values())


@pytest.mark.parametrize("prior", [0.0, 1.0])
@pytest.mark.parametrize("normalize", ["model", "tensor"])
def test_huge_weights_are_no_fault_of_a_sidecar(models: Descendants, normalize: str, prior: float) -> None:
    merged = models.merge(prior=prior, normalize=normalize, weight=[1e308, 0.5e308, 1e308])
    wanted = models.merge(prior=prior, normalize=normalize, weight=[2.0, 1.0, 2.0])
    assert_close(merged, wanted, rtol=1e-6, atol=1e-7)


def test_it_needs_a_parent(models: Descendants) -> None:
    with pytest.raises(
        MergeError,
        match=r"prior: 1\.0 needs what the models were fine-tuned from, with this tensor: give it as base_model",
    ):
        models.inputs.merge(prior=1.0, normalize="tensor", **models.parameters)


# From here on through the commands.


@pytest.mark.parametrize("nodes", ["paper", "all"])
def test_a_recipe_from_data_to_merge(tmp_path: Path, nodes: str) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    models = [one, tiny.sibling(tmp_path / "two", one, seed=1)]
    parent = tiny.sibling(tmp_path / "parent", one, seed=2)
    data = tiny.write_data(tmp_path / "data.jsonl")
    parameters = {"nodes": nodes, "normalize": "tensor", "prior": 1.0, "clip": True}
    recipe = write_recipe(
        tmp_path, models, data, "fisher_mask", parameters=parameters, base_model=str(parent)
    )
    assert str(parent) not in run("compute", recipe).stdout
    assert run("check", recipe).stdout == "ok\n"
    assert mergekit(recipe, tmp_path / "merged").exit_code == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.value.weight"
    values = [load_file(folder / "model.safetensors")[name] for folder in (*models, parent)]
    both, span = values[0] + values[1] - 2 * values[2], torch.stack(values)
    if nodes == "paper":  # Values are averaged: 2/3 of both changes, clipped.
        wanted = (values[2] + both * 2 / 3).clamp(span.amin(0), span.amax(0))
        assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
    else:
        assert float((merged[name] - values[2]).norm()) > 0.5 * float(both.norm())
        assert bool(((merged[name] >= span.amin(0)) & (merged[name] <= span.amax(0))).all())


def test_a_parent_in_a_recipe_of_slices(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    models = [one, tiny.sibling(tmp_path / "two", one, seed=1)]
    parent = tiny.sibling(tmp_path / "parent", one, seed=2)
    data = tiny.write_data(tmp_path / "data.jsonl")
    document = yaml.safe_load(write_recipe(tmp_path, models, data, "fisher_mask").read_text())
    sources = [{**entry, "layer_range": [0, 2]} for entry in document.pop("models")]
    head = {"sources": [{"model": str(one), "layer_range": [2, 2], "parameters": {"weight": 1.0}}]}
    document["parameters"] = {"nodes": "all", "normalize": "tensor", "prior": 1.0}
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({**document, "slices": [{"sources": sources}, head]}))
    run("compute", recipe)
    says = f"base_model {one} has a weight; with prior it is what the models were fine-tuned from"
    assert says in " ".join(run("check", recipe, code=1).output.split())
    failed = mergekit(recipe, tmp_path / "merged")
    assert says in failed.output
    sources.append({"model": str(parent), "layer_range": [0, 2]})
    body = {"sources": sources, "base_model": str(parent)}
    recipe.write_text(yaml.safe_dump({**document, "slices": [body, head]}))
    assert str(parent) not in run("compute", recipe).output
    assert run("check", recipe).stdout == "ok\n"
    assert mergekit(recipe, tmp_path / "merged").exit_code == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    first = load_file(one / "model.safetensors")
    assert_close(merged["classifier.weight"], first["classifier.weight"], rtol=0, atol=0)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    start, values = (
        load_file(parent / "model.safetensors")[name],
        [load_file(m / "model.safetensors")[name] for m in models],
    )
    changes = torch.stack([value - start for value in values])
    found = merged[name] - start
    assert bool((found.abs() <= changes.abs().sum(0) + 1e-6).all())
    assert float((found - changes.mean(0)).norm()) > 0.1 * float(found.norm())


@pytest.mark.parametrize(("changed", "says"), [
    ({"parameters": {"prior": "much", "normalize": "tensor"}}, "prior: Input should be a valid number"),
    ({"parameters": {"prior": 1}}, "so it needs normalize: tensor"),
    ({"base_model": None}, "prior: 1.0 needs what the models were fine-tuned from"),
    ({"fisher": {"data": "data.jsonl"}}, "ok"),
])  # fmt: skip
def test_check_says_what_the_merge_would(
    tmp_path: Path, changed: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = tiny.checkpoint(tmp_path / "one")
    models = [
        one,
        tiny.sibling(tmp_path / "two", one, seed=1),
        tiny.sibling(tmp_path / "parent", one, seed=2),
    ]
    parameters = {"prior": "1", "normalize": "tensor"}
    recipe = write_recipe(
        tmp_path,
        models,
        tiny.write_data(tmp_path / "data.jsonl"),
        "fisher_mask",
        base_model=str(models[2]),
        parameters=parameters,
    )
    document = yaml.safe_load(recipe.read_text())
    document["models"][2] = {"model": str(models[2])}
    recipe.write_text(yaml.safe_dump(document))
    run("compute", recipe)
    assert run("check", recipe).stdout == "ok\n"
    run("inspect", recipe)
    recipe.write_text(yaml.safe_dump({key: value for key, value in {**document, **changed}.items() if value}))
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert says in " ".join(result.output.split())
    document["models"][2]["fisher"] = {"data": "data.jsonl"}
    recipe.write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(app, ["check", str(recipe)])
    says = "is listed, but as the base model it does not count without a weight"
    assert says in " ".join(result.output.split())
