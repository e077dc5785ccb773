"""From `init` to per-task checkpoints through the real commands, every tensor compared with a merge by hand."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import typer.testing
import yaml
from mergekit.scripts import run_yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from tests import commands, tiny


def command(name: str, *arguments: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "FISHER_MASK_CACHE": str(cwd / "cache")}
    result = commands.run([name, *arguments], env=environment, cwd=cwd)
    assert result.returncode == code, result.stderr
    return result


def quickly(name: str, *arguments: str | Path, code: int = 0) -> str:
    """The same command in this process, where starting one each time would take most of the test."""
    given = [str(argument) for argument in arguments]
    result: Any
    if name == "mergekit-yaml":
        result = click.testing.CliRunner().invoke(run_yaml.main, given)
    else:
        result = typer.testing.CliRunner().invoke(app, given)
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def merged_by_hand(one: Path, two: Path, heads: int, shares: tuple[float, float]) -> dict[str, Tensor]:
    """Equation 5 straight from the sidecar files, which any reader of safetensors can do."""
    states, fishers = (
        [weights_of(folder) for folder in (one, two)],
        [load_file(f / "fisher" / "mask_fisher.safetensors") for f in (one, two)],
    )
    merged = {}
    for name, value in states[0].items():
        block, _, leaf = name.rpartition(".")[0].rpartition(".")
        block = block.removesuffix("attention.self") + (
            "attention.output.dense" if block.endswith("self") else ""
        )
        weighted = [torch.full((value.shape[0],), share, dtype=torch.float64) for share in shares]
        for index, (fisher, share) in enumerate(zip(fishers, shares, strict=True)):
            if leaf in ("query", "key"):
                key = f"{block}.{'head' if leaf == 'query' else 'kv_head'}_fisher"
                weighted[index] = share * fisher[key].double().repeat_interleave(value.shape[0] // heads)
            elif name.rpartition(".")[0].endswith("intermediate.dense"):
                weighted[index] = (
                    share * fisher[block.replace("intermediate", "output.dense.neuron_fisher")].double()
                )
        columns = [w.reshape(-1, *[1] * (value.ndim - 1)) for w in weighted]
        if states[1][name].shape == value.shape:
            merged[name] = (columns[0] * value + columns[1] * states[1][name].double()) / (
                columns[0] + columns[1]
            )
    return merged


def two_classifiers(work: Path) -> tuple[Path, Path, Path]:
    """A working folder and two BERTs of one parent, with 2 and 3 labels, and data for each."""
    two = tiny.checkpoint(work / "two", labels=2)
    three = tiny.sibling(work / "three", two, seed=1, labels=3)
    tiny.write_data(work / "two.jsonl", labels=2)
    tiny.write_data(work / "three.jsonl", labels=3, seed=1)
    return work, two, three


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same, measured."""
    work, two, three = two_classifiers(tmp_path_factory.mktemp("work"))
    for folder in (two, three):
        quickly("mergekit-fisher", "compute", folder, "--data", f"{folder}.jsonl")
    return work, two, three


def test_two_classifiers_with_different_heads(tmp_path: Path) -> None:
    work, two, three = two_classifiers(tmp_path)
    recipe = command(
        "mergekit-fisher", "init", "two", "three", "--data", "two.jsonl", "--data", "three.jsonl", cwd=work
    )
    (work / "recipe.yml").write_text(recipe.stdout)
    assert f'data: "{work / "two.jsonl"}"' in recipe.stdout
    measured = command("mergekit-fisher", "compute", "recipe.yml", cwd=work).stdout.splitlines()
    assert [line.split(":")[0] for line in measured] == [str(two), str(three)]
    command("mergekit-yaml", "recipe.yml", "merged", cwd=work)

    merged, own = weights_of(work / "merged"), [weights_of(folder) for folder in (two, three)]
    wanted = merged_by_hand(two, three, heads=4, shares=(1.0, 1.0))
    last = {name for name in own[0] if name.startswith(("classifier", "bert.pooler"))}
    assert merged.keys() == own[0].keys() == wanted.keys() | last
    for name, value in merged.items():
        assert_close(
            value.double(), own[0][name].double() if name in last else wanted[name], rtol=1e-5, atol=1e-6
        )
    plain = {name: (own[0][name] + own[1][name]) / 2 for name in wanted}
    differ = {
        name for name in wanted if float((merged[name] - plain[name]).abs().max()) > 1e-4 and name not in last
    }
    assert all(any(part in name for part in (".query.", ".key.", ".intermediate.")) for name in differ)
    assert len(differ) == 12
    reloaded, report = AutoModelForSequenceClassification.from_pretrained(
        work / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert reloaded.config.num_labels == 2

    written = command("mergekit-fisher", "heads", "recipe.yml", "merged", "tasks", cwd=work).stdout.split()
    assert written == ["tasks/two", "tasks/three"]
    for folder, state, labels in ((two, own[0], 2), (three, own[1], 3)):
        task = work / "tasks" / folder.name
        model, report = AutoModelForSequenceClassification.from_pretrained(task, output_loading_info=True)
        assert not report["missing_keys"]
        assert model.config.num_labels == labels
        for name, value in model.state_dict().items():
            assert_close(value, state[name] if name in last else merged[name], rtol=0, atol=0)
        assert (task / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    command("mergekit-fisher", "heads", "recipe.yml", "merged", "averaged", "--pooler", "average", cwd=work)
    pooler = "bert.pooler.dense.weight"
    for folder in (two, three):
        got = weights_of(work / "averaged" / folder.name)[pooler]
        assert_close(got, (own[0][pooler] + own[1][pooler]) / 2)


def test_heads_refuses_what_it_cannot_do(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, two, three = folders
    monkeypatch.chdir(work)
    recipe = work / "plain.yml"
    recipe.write_text(f"merge_method: fisher_mask\nmodels: [{{model: {two}}}, {{model: {three}}}]\n")
    (work / "there" / "three").mkdir(parents=True)
    result = quickly("mergekit-fisher", "heads", recipe, two, "there", code=1)
    assert "there/three exists; remove it, or choose another folder" in result
    assert not (work / "there" / "two").exists()
    other = tiny.checkpoint(work / "wider", intermediate_size=64)
    result = quickly("mergekit-fisher", "heads", recipe, other, "new", code=1)
    assert "wider is not a merge of" in result
    assert "expected (48,), got (64,)" in result
    assert not (work / "new").exists()


def test_two_classifiers_with_different_heads_from_their_parent(tmp_path: Path) -> None:
    work, two, three = two_classifiers(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(two).config
    AutoModelForMaskedLM.from_config(config).save_pretrained(work / "masked")
    given = ["two", "three", "--data", "two.jsonl", "--data", "three.jsonl", "--parent"]
    refused = command("mergekit-fisher", "init", *given, "masked", cwd=work, code=1).stderr
    assert (
        "masked is a BertForMaskedLM, the checkpoints are BertForSequenceClassification, and mergekit merges"
        in refused
    )
    (advised,) = (line for line in refused.splitlines() if line.startswith("  python"))
    subprocess.run([sys.executable, *shlex.split(advised)[1:]], cwd=work, check=True, capture_output=True)
    recipe = command(
        "mergekit-fisher", "init", *given, "masked-as-BertForSequenceClassification", cwd=work
    ).stdout
    (work / "recipe.yml").write_text(recipe)
    command("mergekit-fisher", "compute", "recipe.yml", cwd=work)
    assert command("mergekit-fisher", "check", "recipe.yml", cwd=work).stdout == "ok\n"
    command("mergekit-yaml", "recipe.yml", "merged", cwd=work)
    merged, start = weights_of(work / "merged"), weights_of(work / "masked")
    own = [weights_of(folder) for folder in (two, three)]

    def alike(name: str) -> torch.Tensor:
        """2/3 of both changes, clipped."""
        span = torch.stack([start[name], own[0][name], own[1][name]])
        both = start[name] + (own[0][name] + own[1][name] - 2 * start[name]) * 2 / 3
        return both.clamp(span.amin(0), span.amax(0))

    name = "bert.encoder.layer.1.attention.self.value.weight"
    assert_close(merged[name], alike(name))
    for part in ("intermediate", "output"):  # Rows of one, and columns of the other.
        name = f"bert.encoder.layer.1.{part}.dense.weight"
        assert float((merged[name] - alike(name)).abs().max()) > 1e-4
    assert_close(merged["classifier.weight"], own[0]["classifier.weight"], rtol=0, atol=0)
    written = command("mergekit-fisher", "heads", "recipe.yml", "merged", "tasks", cwd=work).stdout.split()
    assert written == ["tasks/two", "tasks/three"]


def test_a_parent_must_have_what_the_models_have(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    recipe = yaml.safe_load(
        draft_recipe([str(one), str(two)], parent=str(tiny.sibling(tmp_path / "parent", one, seed=2)))
    )
    body, head = recipe["slices"]  # Heads of like shape, and none of them the parent's.
    assert [source["model"] for source in head["sources"]] == [str(one)]
    assert [source["model"] for source in body["sources"]] == [str(one), str(two), body["base_model"]]
    assert recipe["parameters"] == {"nodes": "columns", "normalize": "tensor", "prior": 1, "clip": True}
    with pytest.raises(RecipeError, match="a checkpoint is named twice"):
        draft_recipe([str(one), str(two)], parent=str(two))
    many = [str(tiny.sibling(tmp_path / f"{seed}", one, seed)) for seed in range(5)]
    assert yaml.safe_load(draft_recipe(many, parent=str(two)))["parameters"]["prior"] == 3
    other = AutoModelForSequenceClassification.from_config(tiny.config_of("bert", hidden_size=64))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"other is no parent of these checkpoints: .* is \[.*32\], there \[.*64\]"
    ):
        draft_recipe([str(one), str(two)], parent=str(tmp_path / "other"))


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "bert"])
def test_every_architecture_merges_and_reloads(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = tiny.checkpoint(tmp_path / "two", architecture, labels=2)
    three = tiny.sibling(tmp_path / "three", two, seed=1, labels=3)
    for folder, labels in ((two, 2), (three, 3)):
        data = tiny.write_data(tmp_path / f"{labels}.jsonl", labels=labels)
        quickly("mergekit-fisher", "compute", folder, "--data", data)
    recipe = quickly("mergekit-fisher", "init", "two", "three")
    assert "fisher: {data" not in recipe
    (tmp_path / "recipe.yml").write_text(recipe)
    quickly("mergekit-yaml", "recipe.yml", "merged")
    (tmp_path / "linear.yml").write_text(yaml.safe_dump(yaml.safe_load(recipe) | {"merge_method": "linear"}))
    quickly("mergekit-yaml", "linear.yml", "linear")
    merged, plain = weights_of(tmp_path / "merged"), weights_of(tmp_path / "linear")
    assert merged.keys() == plain.keys()
    governed = {
        ".query.",
        ".key.",
        ".intermediate.",
        ".q_lin.",
        ".k_lin.",
        ".lin1.",
        ".q_proj.",
        ".k_proj.",
        ".gate_proj.",
        ".up_proj.",
    }
    differ = {name for name in merged if float((merged[name] - plain[name]).abs().max()) > 1e-4}
    assert differ == {name for name in merged if any(part in name for part in governed)}
    quickly("mergekit-fisher", "heads", "recipe.yml", "merged", "tasks")
    for folder, labels in ((two, 2), (three, 3)):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "tasks" / folder.name, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert model.config.num_labels == labels


def test_equal_heads_give_a_plain_list_of_models(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    drafted = yaml.safe_load(quickly("mergekit-fisher", "init", one, two))
    assert [entry["model"] for entry in drafted["models"]] == [str(one), str(two)]
    assert [entry["fisher"]["data"] for entry in drafted["models"]] == ["DATASET", "DATASET"]
    assert "slices" not in drafted


def test_a_recipe_with_random_texts_can_be_measured(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(quickly("mergekit-fisher", "init", one, two, "--data", "random", "--data", "random"))
    quickly("mergekit-fisher", "compute", recipe)


def test_init_refuses_checkpoints_that_differ_in_more_than_heads(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    wider = tiny.checkpoint(tmp_path / "wider", intermediate_size=64)
    deeper = tiny.checkpoint(tmp_path / "deeper", num_hidden_layers=3)
    for other in (wider, deeper):
        result = quickly("mergekit-fisher", "init", one, other, code=1)
        assert "the checkpoints differ in more than their heads: bert.encoder.layer" in result
    assert "named twice" in quickly("mergekit-fisher", "init", one, one, code=1)


def test_a_recipe_that_moves_layers_uses_the_moved_layers_fisher(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, two, three = folders
    monkeypatch.chdir(work)
    sources = [
        f"      - {{model: {folder}, layer_range: [1, 2], parameters: {{weight: 1.0}}}}"
        for folder in (two, three)
    ]
    head = f"  - sources: [{{model: {two}, layer_range: [2, 2], parameters: {{weight: 1.0}}}}]"
    (work / "moved.yml").write_text(
        "\n".join([f"merge_method: fisher_mask\nbase_model: {two}\nslices:\n  - sources:", *sources, head])
    )
    quickly("mergekit-yaml", "moved.yml", "moved")
    wanted = merged_by_hand(two, three, heads=4, shares=(1.0, 1.0))
    for name, value in weights_of(work / "moved").items():
        if "layer.0" in name:
            assert_close(value.double(), wanted[name.replace("layer.0", "layer.1")], rtol=1e-5, atol=1e-6)


def test_a_recipe_sidecar_path_serves_a_read_only_checkpoint(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, two, three = folders
    monkeypatch.chdir(work)
    for folder in (two, three):
        shutil.copy(folder / "fisher" / "mask_fisher.safetensors", work / f"{folder.name}.safetensors")
    bare = [
        shutil.copytree(f, work / f"bare-{f.name}", ignore=shutil.ignore_patterns("fisher"))
        for f in (two, three)
    ]
    lines = [f"  - {{model: {folder}, parameters: {{weight: [{{filter: classifier, value: {head}}}, {{value: 1.0}}], sidecar: {name}.safetensors}}}}"
             for folder, name, head in ((bare[0], "two", 1.0), (two, "two", 0.0))]  # fmt: skip
    (work / "sidecar.yml").write_text("\n".join(["merge_method: fisher_mask\nmodels:", *lines]))
    quickly("mergekit-yaml", "sidecar.yml", "with-sidecar")
    assert_close(weights_of(work / "with-sidecar"), weights_of(two), rtol=1e-6, atol=1e-7)
