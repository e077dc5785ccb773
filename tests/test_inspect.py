"""`mergekit-fisher inspect`: the numbers of sidecars, and shares that are those of the merge itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from typer.testing import CliRunner

from fisher_mask_mergekit import store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from fisher_mask_mergekit.sites import Node
from tests import tiny
from tests.families import FAMILIES, build, sibling
from tests.test_architectures import write_checkpoint
from tests.test_check import recipe_for
from tests.test_diagonal_sidecar import made_up, write_for
from tests.test_end_to_end import quickly, weights_of

BY_NAME = {family.name: family for family in FAMILIES}
OUTPUT = "bert.encoder.layer.1.output.dense"


def inspect(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def shares_of(recipe: Path) -> list[dict[str, Any]]:
    return json.loads(inspect(recipe, "--json"))["shares"]


def test_a_sidecars_metadata_and_statistics(pair: tuple[Path, Path]) -> None:
    path = pair[0] / store.BESIDE
    made = read(path)
    made.fisher[OUTPUT]["neuron_fisher"][:12] = 0
    write(made, path)
    text = inspect(path)
    for part in (
        "checkpoint  somebody/bert-sst2 at 95f0f6f", "class       BertForSequenceClassification",
        "task        sequence-classification", "data        glue:sst2, split train, 9 rows",
        "samples     9, seed 0, at most 40 tokens each (0 were longer)", "estimator   sample, labels data, neuron masks post",
        "loss        0.7000 nats, mean over a sample's predictions; accuracy 0.500", "measured    2026-01-01T00:00:00+00:00 on cpu, weights in float32",
        "versions    torch 2",
    ):  # fmt: skip
        assert part in text
    values = made.fisher[OUTPUT]["neuron_fisher"].double()
    spread = float(values.std(correction=0) / values.mean())
    assert f"       1       48 {float(values.mean()):>10.3e}     {spread:.2f}   25.0%\n" in text
    assert "heads before bert.encoder.layer.*.attention.output.dense (mean in nats squared" in text
    assert "key-value heads" not in text
    assert "share of the merge" not in text
    assert inspect(pair[0]) == text
    assert inspect(path, pair[1]) == text + inspect(pair[1])


def test_a_sidecars_json(pair: tuple[Path, Path]) -> None:
    path = pair[0] / store.BESIDE
    made = read(path)
    answer = json.loads(inspect(path, "--json"))
    assert answer["shares"] == []
    (found,) = answer["sidecars"]
    assert found["path"] == str(path)
    assert found["metadata"] == made.metadata.model_dump(mode="json", exclude={"sites"})
    assert len(found["nodes"]) == 4
    heads = made.fisher["bert.encoder.layer.0.attention.output.dense"]["head_fisher"].double()
    first = found["nodes"][0]
    assert_close(first.pop("mean"), float(heads.mean()))
    assert_close(first.pop("variation"), float(heads.std(correction=0) / heads.mean()))
    assert first == {
        "output": "bert.encoder.layer.0.attention.output.dense", "nodes": "heads", "count": 4, "zeros": 0.0,
        "experts": 0, "unreached": 0,
    }  # fmt: skip


def test_key_value_heads_and_experts_that_no_sample_reached(tmp_path: Path) -> None:
    write_checkpoint(build(BY_NAME["mixtral"]), tmp_path, seed=0)
    made = read(tmp_path / store.BESIDE)
    made.fisher["model.layers.1.mlp.experts.down_proj"]["neuron_fisher"][[0, 3]] = 0
    made.fisher["model.layers.0.self_attn.o_proj"]["head_fisher"][:] = 0
    write(made, tmp_path / store.BESIDE)
    text = inspect(tmp_path)
    assert "key-value heads before model.layers.*.self_attn.o_proj" in text
    assert "   50.0%         2 of 4\n" in text
    assert "    0.0%         0 of 4\n" in text
    assert "       0        4  0.000e+00        -  100.0%\n" in text


def recovered(recipe: Path, folders: tuple[Path, Path]) -> dict[str, tuple[Tensor, Tensor]]:
    """From a merge, the first model's share of each row and of each column of the matrices, by least squares."""
    out = recipe.parent / "merged"
    quickly("mergekit-yaml", recipe, out, "--no-copy-tokenizer")
    one, two, merged = (
        {name: value.double() for name, value in weights_of(folder).items()} for folder in (*folders, out)
    )
    apart = {name: one[name] - two[name] for name in merged if merged[name].ndim == 2}
    products = {name: value * (merged[name] - two[name]) for name, value in apart.items()}
    return {
        name: (products[name].sum(1) / value.square().sum(1), products[name].sum(0) / value.square().sum(0))
        for name, value in apart.items()
    }


@pytest.mark.parametrize("parameters", [
    {"normalize": "none"}, {"normalize": "model"}, {"normalize": "layer", "unmasked": "layer"},
    {"unmasked": "universal"}, {"nodes": "columns", "values": True, "normalize": "tensor"},
    {"nodes": "columns", "unmasked": "layer"}, {"values": True, "unmasked": "universal", "normalize": "tensor"},
], ids=str)  # fmt: skip
def test_the_shares_are_those_of_the_merge(
    pair: tuple[Path, Path], tmp_path: Path, parameters: dict[str, Any]
) -> None:
    recipe = recipe_for(tmp_path, pair, parameters=parameters)
    truth = recovered(recipe, pair)
    groups = shares_of(recipe)
    assert sorted(name for group in groups for name in group["tensors"]) == sorted(weights_of(pair[0]))
    layouts = {"q", "k", "n", None} | ({"mean"} if "unmasked" in parameters else set())
    layouts |= {"v", "columns h"} if parameters.get("values") else set()
    layouts |= {"columns n"} if parameters.get("nodes") == "columns" else set()
    assert {group["layout"] for group in groups} == layouts
    for group in groups:
        assert list(group["models"]) == [str(folder) for folder in pair]
        first, second = group["models"].values()
        assert_close(first["mean"] + second["mean"], 1.0, rtol=1e-9, atol=0)
        assert_close(first["min"] + second["max"], 1.0, rtol=1e-9, atol=0)
        for name in group["tensors"]:
            if name in truth:
                got = torch.tensor((first["mean"], first["min"], first["max"]), dtype=torch.float64)
                own = truth[name][(group["layout"] or "").startswith("columns")]
                wanted = torch.stack((own.mean(), own.min(), own.max()))
                assert_close(got, wanted, rtol=0, atol=1e-4)


def by_layout(recipe: Path, layout: str, layer: int) -> dict[str, Any]:
    (found,) = (
        group
        for group in shares_of(recipe)
        if group["layout"] == layout and f".layer.{layer}." in group["tensors"][0]
    )
    return found


def test_filters_and_gradients_are_resolved_as_mergekit_does(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weight = [
        {"filter": "query", "value": 3.0},
        {"filter": "intermediate", "value": [1.0, 7.0]},
        {"value": 1.0},
    ]
    models = [
        {"model": str(pair[0]), "parameters": {"weight": weight}},
        {"model": str(pair[1]), "parameters": {"weight": 1.0}},
    ]
    recipe = recipe_for(tmp_path, pair, models=models)
    one, two = (read(folder / store.BESIDE).fisher for folder in pair)

    def share(output: str, node: Any, weight: float) -> float:
        first, second = weight * one[output][node].double(), two[output][node].double()
        return float((first / (first + second)).mean())

    attention = "bert.encoder.layer.0.attention.output.dense"
    for layout, layer, wanted in (
        ("q", 0, share(attention, "head_fisher", 3)),
        ("k", 0, share(attention, "kv_head_fisher", 1)),
        ("n", 0, share("bert.encoder.layer.0.output.dense", "neuron_fisher", 1)),
        ("n", 1, share(OUTPUT, "neuron_fisher", 7)),
    ):
        got = by_layout(recipe, layout, layer)["models"][str(pair[0])]["mean"]
        assert_close(got, wanted, rtol=1e-6, atol=0)


def test_a_moved_layer_has_its_own_share(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain = recipe_for(tmp_path, pair)
    wanted = [by_layout(plain, "n", layer)["models"] for layer in (0, 1)]
    slices = [
        {
            "sources": [
                {"model": str(m), "layer_range": [i, i + 1], "parameters": {"weight": 1.0}} for m in pair
            ]
        }
        for i in (1, 0)
    ]
    moved = recipe_for(tmp_path, pair, models=None, slices=slices)
    assert [by_layout(moved, "n", layer)["models"] for layer in (1, 0)] == wanted
    assert by_layout(moved, "n", 0)["output"] == OUTPUT


def test_averaged_values_that_share_a_tensor_are_left_out(tmp_path: Path) -> None:
    parent = build(BY_NAME["gpt2"])
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        write_checkpoint(sibling(parent, seed), folder, seed)
    one, two = (read(folder / store.BESIDE).fisher["transformer.h.0.attn.c_proj"] for folder in folders)
    for values, title in ((False, "query and key rows"), (True, "query, key and value rows")):
        parts: list[Node] = ["head_fisher", "kv_head_fisher"]
        if values:
            parts.append("kv_head_fisher")
        first, second = (torch.cat([f[part] for part in parts]).double() for f in (one, two))
        recipe = recipe_for(tmp_path, folders, parameters={"values": values})
        found = next(g for g in shares_of(recipe) if g["layout"] == "q k v")
        assert found["tensors"] == ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight"]
        wanted = float((first / (first + second)).mean())
        assert_close(found["models"][str(folders[0])]["mean"], wanted, rtol=1e-6, atol=0)
        assert f"\n{title} of transformer.h.*.attn.c_attn\n" in inspect(recipe)


def test_the_text_of_a_recipe(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair)
    text = inspect(recipe)
    assert text.startswith(inspect(*pair))
    assert f"  [1] {pair[0]}\n  [2] {pair[1]}\n" in text
    assert "\nquery rows of bert.encoder.layer.*.attention.self.query\n" in text
    assert "\nneurons of bert.encoder.layer.*.intermediate.dense\n" in text
    one, other = (by_layout(recipe, "n", 1)["models"][str(folder)] for folder in pair)
    cells = [f"{m['mean']:.3f} ({m['min']:.2f}-{m['max']:.2f})" for m in (one, other)]
    assert f"         1   {cells[0]}   {cells[1]}\n" in text
    assert "\nother tensors (29): " in text


def test_the_weights_values_are_not_needed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair)
    before = shares_of(recipe)
    for folder in pair:
        state = load_file(folder / "model.safetensors")
        save_file(
            {name: torch.zeros_like(value) for name, value in state.items()}, folder / "model.safetensors"
        )
    assert shares_of(recipe) == before


def test_a_model_without_a_sidecar(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / store.BESIDE).unlink()
    recipe = recipe_for(tmp_path, pair)
    assert f"there is no sidecar for {pair[1]}. Measure it:  mergekit-fisher compute {recipe}" in inspect(
        recipe, code=1
    )
    recipe = recipe_for(tmp_path, pair, parameters={"missing": "average"})
    (everything,) = shares_of(recipe)
    assert {model["mean"] for model in everything["models"].values()} == {0.5}
    assert f"there is no sidecar for {pair[1]}" in inspect(pair[1], code=1)


def test_a_full_size_sidecar_by_its_own_folder_and_by_its_checkpoints(tmp_path: Path) -> None:
    model = tiny.classifier("bert")
    fisher = made_up(model)
    full = write_for(model, tmp_path / store.DIAGONAL_BESIDE, fisher)
    text = inspect(full.folder)
    assert text.startswith(f"{full.folder}\n  checkpoint  somebody/bert-sst2 at 95f0f6f\n")
    assert "--kind diagonal" in text
    count = sum(map(Tensor.numel, fisher.values()))
    assert f"every parameter: {count:,} in 41 tensors, mean {full.metadata.mean:.3e} nats squared\n" in text
    assert inspect(tmp_path) == text
    (found,) = json.loads(inspect(tmp_path, "--json"))["sidecars"]
    assert (found["metadata"]["mean"], found["nodes"]) == (full.metadata.mean, [])
    assert not {"tensors", "views", "others"} & found["metadata"].keys()
    for option in ("--html", "--png"):
        page = tmp_path / "page"
        assert f"{full.folder} is of kind diagonal: it has no mask nodes to draw" in inspect(
            tmp_path, option, page, code=1
        )
        assert not page.exists()


def test_without_a_sidecar_to_draw_nothing_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in pair:
        (folder / store.BESIDE).unlink()
    recipe = recipe_for(tmp_path, pair, parameters={"missing": "average"})
    page, picture = tmp_path / "x.html", tmp_path / "y.png"
    said = inspect(recipe, "--html", page, "--png", picture, code=1)
    assert "there is no sidecar to draw" in said
    assert not page.exists()


def test_what_cannot_be_inspected_is_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair, merge_method="linear")
    assert "merge_method is linear, which uses no sidecars" in inspect(recipe, code=1)
    assert "takes one recipe, or any number of sidecars" in inspect(recipe, pair[0], code=1)
    assert "cannot read sidecar" in inspect(tmp_path / "none", code=1)
    made = read(pair[0] / store.BESIDE)
    tensors = made.metadata.sites[0].tensors
    wide = tensors[0].model_copy(update={"shape": (32, 99)})
    site = made.metadata.sites[0].model_copy(update={"tensors": (wide, *tensors[1:])})
    sites = (site, *made.metadata.sites[1:])
    write(
        Sidecar(made.metadata.model_copy(update={"sites": sites}), made.fisher, made.values),
        pair[0] / store.BESIDE,
    )
    message = inspect(recipe_for(tmp_path, pair), code=1)
    assert "SidecarMismatchError" in message
    assert "is [32, 99], in " in message
