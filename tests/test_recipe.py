"""The recipe: what is read of it, and what is said of a wrong one."""

from pathlib import Path

import pytest

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.recipe import Recipe, read_recipe

MODELS = """
merge_method: fisher_mask
models:
  - model: org/a
    fisher: {data: "glue:sst2", samples: 7}
  - model: org/b@v1
    fisher: {data: "glue:mrpc"}
    parameters: {weight: 0.5, sidecar: there.safetensors}
fisher: {samples: 9, seed: 3}
dtype: float32
"""
SLICES = """
merge_method: fisher_mask
base_model: org/a
slices:
  - sources:
      - {model: org/a, layer_range: [0, 2], fisher: {data: x.jsonl}, parameters: {weight: 1.0}}
      - {model: org/b, layer_range: [0, 2], fisher: {data: y.jsonl}}
  - sources:
      - {model: org/a, layer_range: [2, 2]}
"""


def parse(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return read_recipe(path)


def test_models_and_their_settings(tmp_path: Path) -> None:
    recipe = parse(tmp_path, MODELS)
    first, second = recipe.models
    assert (first.name, first.weight, first.sidecar, first.is_base) == ("org/a", None, None, False)
    assert (second.name, second.weight, second.sidecar) == ("org/b@v1", 0.5, "there.safetensors")
    assert first.settings is not None
    assert second.settings is not None
    assert (first.settings.data, first.settings.samples, first.settings.seed) == ("glue:sst2", 7, 3)
    assert (second.settings.data, second.settings.samples) == ("glue:mrpc", 9)


def test_slices_and_base(tmp_path: Path) -> None:
    recipe = parse(tmp_path, SLICES)
    assert [(model.name, model.is_base, model.weight) for model in recipe.models] == [
        ("org/a", True, 1.0),
        ("org/b", False, None),
    ]
    assert [model.settings and model.settings.data for model in recipe.models] == ["x.jsonl", "y.jsonl"]


def test_modules(tmp_path: Path) -> None:
    recipe = parse(
        tmp_path, "merge_method: fisher_mask\nmodules: {text: {models: [{model: org/a, fisher: {data: d}}]}}"
    )
    assert [model.name for model in recipe.models] == ["org/a"]


def test_parameters_for_all_models(tmp_path: Path) -> None:
    recipe = parse(tmp_path, MODELS + "parameters: {weight: 2.0}")
    assert [model.weight for model in recipe.models] == [2.0, 0.5]


def test_a_weight_that_is_not_one_number_is_said_to_vary(tmp_path: Path) -> None:
    for weight in ("[{filter: classifier, value: 1.0}, {value: 0.5}]", "[0.0, 1.0]"):
        first, second = parse(tmp_path, MODELS.replace("weight: 0.5", f"weight: {weight}")).models
        assert (first.weight, second.weight) == (None, "varies")
    head = SLICES.replace("[2, 2]}", "[2, 2], parameters: {weight: 3.0}}")
    assert parse(tmp_path, head).models[0].weight == 1.0
    unequal = SLICES.replace("[2, 2]}", "[1, 2], parameters: {weight: 3.0}}")
    assert parse(tmp_path, unequal).models[0].weight == "varies"


def test_a_weight_may_be_text(tmp_path: Path) -> None:
    """YAML 1.1 has a number with an exponent and without a point as text, and the merge takes it."""
    for weight, wanted in (("1e-1", 0.1), ("'2'", 2.0), ("much", "varies")):
        assert parse(tmp_path, MODELS.replace("weight: 0.5", f"weight: {weight}")).models[1].weight == wanted


PARENT = """
merge_method: fisher_mask
base_model: a
fisher: {data: d}
parameters: {prior: 1}
slices:
  - base_model: p
    sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}, {model: p, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 2]}]
"""


def test_a_model_counts_unless_it_is_the_base_wherever_it_has_layers(tmp_path: Path) -> None:
    def counted(text: str) -> dict[str, bool]:
        return {model.name: model.counts for model in parse(tmp_path, text).models}

    assert counted(PARENT) == {"a": True, "b": True, "p": False}
    assert counted(PARENT.replace("base_model: a", "base_model: p")) == {"a": True, "b": True, "p": False}
    assert counted(PARENT.replace("  - base_model: p\n    s", "  - s")) == {"a": False, "b": True, "p": True}
    assert counted(MODELS + "base_model: org/a") == {"org/a": False, "org/b@v1": True}
    assert counted(MODELS + "base_model: org/p")["org/p"] is False
    # Nothing in one slice, and 1 in the other.
    model = parse(tmp_path, PARENT.replace("[2, 2]", "[1, 2]")).models[0]
    assert (model.counts, model.weight) == (True, "varies")


def test_data_for_all_models_is_not_for_their_parent(tmp_path: Path) -> None:
    def merged(text: str) -> dict[str, tuple[bool, bool]]:
        return {m.name: (m.settings is not None, m.is_merged) for m in parse(tmp_path, text).models}

    assert merged(PARENT) == {"a": (True, True), "b": (True, True), "p": (False, False)}
    own = PARENT.replace("{model: p, ", "{model: p, fisher: {data: e}, ")
    assert merged(own)["p"] == (True, True)


def test_parameters_of_a_slice_and_of_a_model_beat_those_above(tmp_path: Path) -> None:
    text = SLICES + "parameters: {weight: 5.0}\n"
    assert [model.weight for model in parse(tmp_path, text.replace(", [2, 2]", "")).models][1] == 5.0
    sliced = text.replace(
        "  - sources:\n      - {model: org/a, layer_range: [0",
        "  - parameters: {weight: 2.0}\n    sources:\n      - {model: org/a, layer_range: [0",
    )
    assert [model.weight for model in parse(tmp_path, sliced).models] == [1.0, 2.0]


def test_an_unlisted_base_is_a_model_without_data(tmp_path: Path) -> None:
    recipe = parse(tmp_path, MODELS + "base_model: org/parent")
    assert [(model.name, model.is_base) for model in recipe.models][2] == ("org/parent", True)
    assert recipe.models[2].settings is None


def test_overrides_beat_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(MODELS)
    settings = [model.settings for model in read_recipe(path, {"samples": 2, "text": "body"}).models]
    assert [one and (one.samples, one.text) for one in settings] == [(2, "body"), (2, "body")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: [", "is not YAML: while parsing"),
        ("just words", "is not a mergekit recipe: it has no merge_method"),
        ("merge_method: fisher_mask", "names no models"),
        ("merge_method: fisher_mask\nmodels: org/a", "models must be a list, got 'org/a'"),
        ("merge_method: fisher_mask\nmodels: [org/a]", "an entry of models must be a mapping"),
        ("merge_method: fisher_mask\nmodels: [{weight: 1}]", "expected 'model: NAME'"),
        (MODELS.replace("samples: 7", "sampels: 7"), "fisher of org/a: unknown key 'sampels'; known keys: data, samples"),
        (MODELS.replace("samples: 9", "sample: 9"), "recipe.yml: fisher: unknown key 'sample'"),
        (MODELS.replace("samples: 7", "samples: 0"), "samples: Input should be greater than or equal to 1, got 0"),
        (MODELS.replace("samples: 7", "label_map: {0: no, 1: yes}"), "YAML reads yes, no, on and off as true and false"),
        (MODELS.replace("samples: 7", "samples: true"), "put quotes around them"),
        (MODELS + "parameters: {nodes: al}", "recipe.yml: nodes: expected one of paper, columns, all for all tensors alike, got 'al'"),
        (MODELS + "parameters: {nodes: [{filter: query, value: all}, {value: paper}]}", r"nodes: expected .* alike, got \[{'filter': "),
        (MODELS + "parameters: {nodes: {value: all}}", "nodes: expected .* alike, got {'value': 'all'}"),
        (MODELS + "parameters: {nodes: [paper, all]}", r"nodes: expected .* alike, got \['paper', 'all'\]"),
        ("merge_method: m\nx: 2024-13-45", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        (SLICES.replace("[2, 2]}", "[2, 2], parameters: {sidecar: b}}").replace("weight: 1.0", "sidecar: a"), "appears with different sidecars: a, b"),
        (MODELS.replace("samples: 7", "labels: some"), "labels: Input should be 'data', 'sampled' or 'exact', got 'some'"),
        (MODELS.replace("samples: 7", "estimator: batch, labels: exact"), "it takes labels data or sampled"),
        (MODELS.replace('{data: "glue:sst2", samples: 7}', "glue:sst2"), "fisher of org/a must be a mapping"),
        (SLICES.replace("[2, 2]}", "[2, 2], fisher: {data: z}}"), "org/a appears twice with different fisher: keys"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(tmp_path, text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe .*none.yml: No such file"):
        read_recipe(tmp_path / "none.yml")


@pytest.mark.parametrize("base", ["{a: 1}", "[a]", "1"])
def test_a_base_model_that_is_no_name_is_left_to_mergekit(tmp_path: Path, base: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"merge_method: fisher_mask\nbase_model: {base}\nslices: [{{base_model: {base}, sources: [{{model: a}}, {{model: b}}]}}]\n"
    )
    assert [(model.name, model.is_base) for model in read_recipe(path).models] == [("a", False), ("b", False)]


def test_a_slice_has_a_base_model_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    text = "merge_method: fisher_mask\nbase_model: a\nslices: [{base_model: %s, sources: [{model: a}, {model: b}, {model: c}]}]\n"
    path.write_text(text % "c")
    assert [model.is_base for model in read_recipe(path).models] == [True, False, True]
    path.write_text(text % ("c" * 300))
    with pytest.raises(RecipeError, match="expected a path or hub id of no more than"):
        read_recipe(path)
