"""Every recipe in `recipes/`, run as it stands but for its names: small local stand-ins for what is on the hub."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from fisher_mask_mergekit.recipe import read_recipe
from tests import tiny
from tests.test_end_to_end import quickly, weights_of

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yml"))


def layers_of(recipe: Path) -> int:
    """What its slices say, else BERT-base's."""
    found = re.findall(r"layer_range: \[0, (\d+)\]", recipe.read_text())
    return int(found[0]) if found else 12


def localise(recipe: Path, folder: Path) -> Path:
    """The recipe with every hub id replaced by a tiny checkpoint of its kind, every data set by a file."""
    text = recipe.read_text()
    parent: dict[str, Path] = {}
    for seed, model in enumerate(read_recipe(recipe).models):
        kind = "roberta" if "roberta" in model.name else "bert"
        labels = 3 if "mnli" in model.name else 2
        target = folder / model.name.replace("/", "--")
        if kind not in parent:
            parent[kind] = tiny.checkpoint(target, kind, labels, num_hidden_layers=layers_of(recipe))
        else:
            tiny.sibling(target, parent[kind], seed, labels)
        text = text.replace(model.name, str(target))
        data = tiny.write_data(folder / f"{seed}.jsonl", labels=labels, seed=seed)
        if model.settings is not None:
            assert model.settings.data is not None
            text = text.replace(f'"{model.settings.data}"', f'"{data}"')
        else:
            assert model.sidecar is not None
            quickly("mergekit-fisher", "compute", target, "--data", data, "--out", folder / model.sidecar)
    local = folder / recipe.name
    local.write_text(text)
    return local


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = localise(recipe, tmp_path)
    measured = quickly("mergekit-fisher", "compute", local).splitlines()
    assert len(measured) == sum(model.settings is not None for model in read_recipe(recipe).models)
    quickly("mergekit-yaml", local, "merged")
    _, report = AutoModelForSequenceClassification.from_pretrained("merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    plain = yaml.safe_load(local.read_text()) | {"merge_method": "linear"}
    plain.pop("parameters", None)
    Path("linear.yml").write_text(yaml.safe_dump(plain))
    quickly("mergekit-yaml", "linear.yml", "linear")
    merged, linear = weights_of(Path("merged")), weights_of(Path("linear"))
    moved = [name for name in merged if float((merged[name] - linear[name]).abs().max()) > 1e-4]
    assert len(moved) >= 6 * layers_of(recipe)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 9


def test_the_papers_checkpoints_are_there() -> None:
    paper = [recipe for recipe in RECIPES if recipe.parent.name == "paper"]
    named = {recipe.stem: [model.name for model in read_recipe(recipe).models] for recipe in paper}
    assert set(named) == {"bert-tiny", "bert-base", "bert-large", "roberta-base"}
    assert all(len(set(names)) == 6 for names in named.values())
    assert len({name for names in named.values() for name in names}) == 24
