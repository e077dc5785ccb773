"""References ``base+adapter``: measured as what mergekit makes of them, and found again by the same reference."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from fisher_mask_mergekit.checkpoint import Checkpoint
from fisher_mask_mergekit.sidecar import read
from fisher_mask_mergekit.store import BESIDE, cached
from tests import tiny
from tests.test_end_to_end import quickly, weights_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "base", "llama")


def adapter(base: Path, folder: Path, seed: int) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    chosen = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, chosen)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    names = [f"{base}+{adapter(base, tmp_path / name, seed)}" for seed, name in enumerate(("one", "two"))]
    document = {
        "merge_method": "fisher_mask",
        "models": [
            {"model": name, "fisher": {"data": str(tiny.write_data(tmp_path / f"{seed}.jsonl", seed=seed))}}
            for seed, name in enumerate(names)
        ],
        "base_model": str(base),
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    return tmp_path / "recipe.yml"


def merge(recipe: Path, out: Path, code: int = 0) -> str:
    cache = recipe.parent / "applied"
    return quickly(
        "mergekit-yaml", recipe, out, "--lora-merge-cache", cache, "--no-write-model-card", code=code
    )


def test_two_adapters_of_one_base(recipe: Path, tmp_path: Path) -> None:
    quickly("mergekit-fisher", "compute", recipe)
    sidecars = [read(tmp_path / name / BESIDE) for name in ("one", "two")]
    assert [sidecar.metadata.checkpoint for sidecar in sidecars] == [
        f"{tmp_path / 'base'}+{tmp_path / name}" for name in ("one", "two")
    ]
    merge(recipe, tmp_path / "merged")
    merged = weights_of(tmp_path / "merged")
    applied = {folder.name.split("_")[2]: weights_of(folder) for folder in (tmp_path / "applied").iterdir()}
    states = [applied["one"], applied["two"]]
    name = "model.layers.1.mlp.up_proj.weight"
    one, two = (s.fisher["model.layers.1.mlp.down_proj"]["neuron_fisher"][:, None] for s in sidecars)
    assert_close(merged[name], (one * states[0][name] + two * states[1][name]) / (one + two))
    assert not torch.equal(states[0][name], states[1][name])


def test_a_sidecar_in_the_cache_is_found_by_the_reference(recipe: Path, base: Path, tmp_path: Path) -> None:
    quickly("mergekit-fisher", "compute", recipe)
    shutil.move(tmp_path / "two" / BESIDE, tmp_path / "kept")
    assert f"no sidecar for {base}+{tmp_path / 'two'}" in merge(recipe, tmp_path / "merged", code=1)
    place = cached(Checkpoint(f"{base}+{tmp_path / 'two'}", base, None))
    place.parent.mkdir(parents=True)
    shutil.move(tmp_path / "kept", place)
    merge(recipe, tmp_path / "merged")


def test_an_adapter_that_was_trained_on_is_not_taken_for_the_measured_one(
    recipe: Path, base: Path, tmp_path: Path
) -> None:
    quickly("mergekit-fisher", "compute", recipe)
    kept = read(tmp_path / "one" / BESIDE)
    adapter(base, tmp_path / "one", seed=7)
    assert "has other values" in merge(recipe, tmp_path / "merged", code=1)
    quickly("mergekit-fisher", "compute", recipe)
    assert read(tmp_path / "one" / BESIDE).metadata.weights != kept.metadata.weights


def test_an_adapter_that_is_not_there(base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data.jsonl")
    said = quickly("mergekit-fisher", "compute", f"{base}+{tmp_path / 'none'}", "--data", data, code=1)
    assert f"cannot apply {tmp_path / 'none'} to {base}" in said


def test_a_drafted_recipe_names_base_and_adapter(
    recipe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drafted = yaml.safe_load(quickly("mergekit-fisher", "init", "base+one", "base+two"))
    names = [f"{base}+{tmp_path / name}" for name in ("one", "two")]
    assert [model["model"] for model in drafted["models"]] == names
    assert drafted["base_model"] == names[0]
