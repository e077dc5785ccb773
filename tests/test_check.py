"""`mergekit-fisher check`: everything that it knows is found, and nothing where a merge ends well."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import get
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from fisher_mask_mergekit import store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.preview import check_keys, check_sidecars
from fisher_mask_mergekit.preview.check import check_recipe
from fisher_mask_mergekit.preview.findings import Finding
from fisher_mask_mergekit.preview.peek import peek
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from tests import tiny
from tests.families import FAMILIES, Fails, Family, Loses, siblings
from tests.test_sidecar import sidecar_for


def recipe_for(folder: Path, models: Sequence[Path | str], /, **changes: Any) -> Path:
    document: dict[str, Any] = {
        "merge_method": "fisher_mask",
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
        "base_model": str(models[0]),
        "dtype": "float32",
    }
    document = {key: value for key, value in (document | changes).items() if value is not None}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def measure(folder: Path, seed: int = 0, **changes: Any) -> Sidecar:
    """Put a sidecar with made-up Fisher information beside a checkpoint."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    made = sidecar_for(model, seed=seed)
    sidecar = Sidecar(made.metadata.model_copy(update=changes), made.fisher, made.values)
    write(sidecar, folder / store.BESIDE)
    return sidecar


def findings(folder: Path, models: Sequence[Path | str], /, **changes: Any) -> list[Finding]:
    return check_recipe(recipe_for(folder, models, **changes))


def only(found: list[Finding]) -> tuple[str, str, str, str]:
    assert len(found) == 1, found
    return found[0].level, found[0].what, found[0].detail, found[0].remedy


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_it_foretells_what_mergekit_does_with_every_architecture(family: Family, tmp_path: Path) -> None:
    found = findings(tmp_path, siblings(family, tmp_path))
    found = [one for one in found if one.what != "sidecar"]
    if family.merge == "ok":
        assert not found
        return
    assert {one.level for one in found} == {"error"}
    if isinstance(family.merge, Loses):
        (lost,) = found
        assert lost.what == "loss"
        assert all(part in lost.detail for part in family.merge.parts)
    if isinstance(family.merge, Fails):
        (refusal,) = {one.what for one in found}
        assert refusal in ("recipe", "architecture")
        # Of several tensors, which one mergekit misses first is its own affair.
        message = family.merge.message
        known = " required but not present" if "required" in message else message
        assert all(known in one.detail for one in found)


def test_nothing_is_wrong(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair)
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert (result.exit_code, result.stdout) == (0, "ok\n")
    result = CliRunner().invoke(app, ["check", str(recipe), "--json"])
    assert json.loads(result.stdout) == {"recipe": str(recipe), "ok": True, "findings": []}


def test_errors_are_exit_code_1_and_come_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.rmtree(pair[1] / "fisher")
    recipe = recipe_for(tmp_path, pair, dtype="float16")
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 1
    command = f"mergekit-fisher compute {pair[1]} --data DATASET"
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"error: sidecar: there is none for {pair[1]}", f"  {command}"]
    assert lines[2].startswith("warning: dtype: dtype is float16")
    assert len(lines) == 4
    result = CliRunner().invoke(app, ["check", str(recipe), "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert not answer["ok"]
    detail = f"there is none for {pair[1]}"
    assert answer["findings"][0] == {"level": "error", "what": "sidecar", "detail": detail, "remedy": command}


def test_warnings_alone_are_exit_code_0(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair, out_dtype="float16")
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 0
    assert result.stdout.startswith("warning: dtype: out_dtype is float16: weights beyond 65504 overflow")
    assert "ok" not in result.stdout.splitlines()


def test_a_missing_base_and_another_method(pair: tuple[Path, Path], tmp_path: Path) -> None:
    level, what, detail, remedy = only(findings(tmp_path, pair, base_model=None))
    assert (level, what, remedy) == ("warning", "base model", f"base_model: {pair[0]}")
    assert "configuration from an arbitrary input" in detail
    for folder in pair:
        shutil.rmtree(folder / "fisher")
    level, what, detail, _ = only(findings(tmp_path, pair, merge_method="linear"))
    assert (level, what, detail) == ("warning", "recipe", "merge_method is linear, which uses no sidecars")


@pytest.mark.parametrize(("text", "message"), [
    ("merge_method: [", "is not YAML"),
    ("models: []", "has no merge_method"),
    ("merge_method: fisher_mask\nmodels: [{model: a, fisher: {sample: 1}}]", "unknown key 'sample'"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    level, what, detail, _ = only(check_recipe(tmp_path / "recipe.yml"))
    assert (level, what) == ("error", "recipe")
    assert message in detail


def test_what_mergekit_refuses_is_said_in_its_words(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for changes, message in (
        ({"parameters": {"normalize": "much"}}, "Input should be 'none', 'model', 'layer' or 'tensor'"),
        ({"slices": [{"sources": [{"model": str(pair[0]), "layer_range": [0, 2]}]}]}, "Exactly one of"),
    ):
        level, what, detail, _ = only(findings(tmp_path, pair, **changes))
        assert (level, what) == ("error", "recipe")
        assert message in detail
        assert "/tmp" not in detail.replace(str(tmp_path), "")


def test_no_such_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    level, what, detail, _ = only(findings(tmp_path, [pair[0], "nosuch/model"]))
    assert (level, what) == ("error", "checkpoint")
    assert "nosuch/model is neither a folder here nor a checkpoint to be had from the hub" in detail


def test_heads_that_differ_and_the_recipe_that_deals_with_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    three = tiny.sibling(tmp_path / "three", pair[0], seed=2, labels=3)
    measure(three, 2)
    level, what, detail, remedy = only(findings(tmp_path, [pair[0], three]))
    assert (level, what) == ("error", "heads")
    assert f"classifier.bias is [2] in {pair[0]}, [3] in {three}" in detail
    assert remedy.endswith(f"mergekit-fisher init {pair[0]} {three}")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(draft_recipe([str(pair[0]), str(three)]))
    assert check_recipe(recipe) == []


def test_vocabularies_that_differ_and_the_tokenizer_that_aligns_them(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(pair[1])
    model.resize_token_embeddings(70)
    model.save_pretrained(pair[1])
    level, what, detail, remedy = only(findings(tmp_path, pair))
    assert (level, what) == ("error", "vocabulary")
    assert f"word_embeddings.weight is [64, 32] in {pair[0]}, [70, 32] in {pair[1]}" in detail
    assert "tokenizer: {source: base}" in remedy
    assert findings(tmp_path, pair, tokenizer={"source": "base"}) == []
    assert findings(tmp_path, pair, tokenizer_source="union") == []


def test_models_of_different_sizes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = tiny.checkpoint(tmp_path / "wide", intermediate_size=64)
    measure(wide)
    found = findings(tmp_path, [pair[0], wide])
    assert {(one.level, one.what) for one in found} == {("error", "shapes"), ("error", "sidecar")}
    assert "intermediate.dense.bias is [48] in" in next(one.detail for one in found if one.what == "shapes")


def test_classes_and_architectures_that_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (pair[1] / "config.json").write_text(json.dumps(config))
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("warning", "architecture")
    assert f"{pair[1]} is a BertForTokenClassification" in detail
    other = tiny.checkpoint(tmp_path / "other", "roberta")
    found = findings(tmp_path, [pair[0], other])
    assert any(one.level == "error" and f"{other} is a roberta" in one.detail for one in found)
    assert any("mix different architectures" in one.detail for one in found)


def test_a_class_that_transformers_does_not_have(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in pair:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OwnModel"]}))
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("warning", "architecture")
    assert "transformers has no OwnModel" in detail


def test_the_command_that_measures_is_the_recipes_if_it_has_data(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (pair[1] / store.BESIDE).unlink()
    entries = [
        {"model": str(folder), "fisher": {"data": "some/words"}, "parameters": {"weight": 1.0}}
        for folder in pair
    ]
    measure(pair[0], settings=FisherSettings(data="some/words"))
    found = findings(tmp_path, pair, models=entries)
    assert only(found)[::3] == ("error", f"mergekit-fisher compute {tmp_path / 'recipe.yml'}")
    found = findings(tmp_path, pair, parameters={"missing": "average"})
    level, what, detail, _ = only(found)
    assert (level, what) == ("warning", "sidecar")
    assert detail == f"there is none for {pair[1]}: all models are averaged by weight"


def test_two_models_with_one_sidecar_are_told_to_have_one_each(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The command alone would be refused."""
    same = pair[0] / store.BESIDE
    models = [
        {"model": str(folder), "fisher": {"data": "data.jsonl"}, "parameters": {"weight": 1.0, "sidecar": str(same)}}
        for folder in pair
    ]  # fmt: skip
    recipe = recipe_for(tmp_path, pair, models=models)
    (remedy,) = {one.remedy for one in check_recipe(recipe) if one.what == "sidecar" and one.level == "error"}
    assert remedy == (
        f"give each model that names  sidecar: {same}  one of its own first, then:  mergekit-fisher compute {recipe}"
    )


def test_a_base_that_does_not_count_needs_no_sidecar(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = tiny.sibling(tmp_path / "base", pair[0], seed=5)
    assert findings(tmp_path, pair, base_model=str(base)) == []


def test_a_stale_sidecar_and_a_broken_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(pair[0] / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    save_file(state | {name: state[name] * 1.01}, pair[0] / "model.safetensors", {"format": "pt"})
    level, what, detail, remedy = only(findings(tmp_path, pair))
    assert (level, what) == ("error", "sidecar")
    assert f"tensor '{name}' has other values" in detail
    assert remedy.startswith(f"mergekit-fisher compute {pair[0]}")
    (pair[0] / store.BESIDE).write_bytes(b"broken")
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("error", "sidecar")
    assert "is not a whole safetensors file" in detail


def test_a_sidecar_of_another_architecture_and_one_with_fewer_sites(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    kept = read(pair[1] / store.BESIDE)
    other = tiny.checkpoint(tmp_path / "other", "distilbert")
    measure(other)
    shutil.copy(other / store.BESIDE, pair[1] / store.BESIDE)
    found = findings(tmp_path, pair)
    assert f"governs no tensor that is merged of {pair[1]}" in found[0].detail
    assert found[0].level == "error"
    fewer = tuple(site for site in kept.metadata.sites if site.kind == "ffn")
    write(
        Sidecar(
            kept.metadata.model_copy(update={"sites": fewer}),
            {site.output: kept.fisher[site.output] for site in fewer},
            {tensor.name: kept.values[tensor.name] for site in fewer for tensor in site.tensors},
        ),
        pair[1] / store.BESIDE,
    )
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("error", "sidecar")
    assert "disagree about which mask nodes" in detail


@pytest.mark.parametrize(("changes", "message"), [
    ({"settings": FisherSettings(data="x", estimator="batch")}, "the models differ in estimator: sample for"),
    ({"settings": FisherSettings(data="x", mask_placement="pre")}, "differ in mask_placement: post for"),
    ({"settings": FisherSettings(data="x", labels="exact")}, "differ in labels: data for"),
    ({"settings": FisherSettings(data="x", loss="sum")}, "differ in loss: mean for"),
    ({"samples": 5}, "differ in samples: 9 for"),
    ({"task": "causal-lm"}, "differ in task: sequence-classification for"),
    ({"loss": 1.5}, "losses differ: 0.7000 for"),
])  # fmt: skip
def test_models_that_were_measured_unlike(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    measure(pair[1], 1, **changes)
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("warning", "measurement")
    assert message in detail


def test_normalizing_takes_unequal_losses_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    measure(pair[1], 1, loss=1.5)
    assert only(findings(tmp_path, pair))[3].endswith("parameters: {normalize: model}")
    assert findings(tmp_path, pair, parameters={"normalize": "model"}) == []
    measure(pair[1], 1, loss=0.7 * check_sidecars._UNEQUAL_LOSSES - 1e-6)
    assert findings(tmp_path, pair) == []


def test_weights_that_cannot_be_or_do_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def weighted(*weights: float | None) -> list[Finding]:
        entries = [
            {"model": str(folder)} | ({} if weight is None else {"parameters": {"weight": weight}})
            for folder, weight in zip(pair, weights, strict=True)
        ]
        return findings(tmp_path, pair, models=entries)

    assert "is -1.0; expected a number of 0 or more" in only(weighted(1.0, -1.0))[2]
    assert "every model has weight 0" in only(weighted(0.0, 0.0))[2]
    assert only(weighted(0.0, 1.0))[:2] == ("warning", "weight")
    first, second = weighted(None, None)
    assert f"{pair[0]} is listed, but as the base model it does not count" in first.detail
    assert f"nothing is merged: every tensor is that of {pair[1]} alone" in second.detail


def test_the_recipe_s_base_counts_in_a_slice_that_has_another(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    parent = tiny.sibling(tmp_path / "parent", pair[0], seed=2)
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in (*pair, parent)]
    body = {"sources": sources, "base_model": str(parent)}
    head = {"sources": [{"model": str(pair[0]), "layer_range": [2, 2]}]}
    given = {"models": None, "slices": [body, head], "parameters": {"prior": 1, "normalize": "tensor"}}
    assert findings(tmp_path, pair, **given) == []
    of_all = findings(tmp_path, pair, **given, fisher={"data": "nowhere.jsonl"})
    assert not [one for one in of_all if one.what == "weight" or str(parent) in one.detail]


def test_layers_left_out_on_purpose_are_no_loss(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sources = [
        {"model": str(folder), "layer_range": [1, 2], "parameters": {"weight": 1.0}} for folder in pair
    ]
    assert findings(tmp_path, pair, models=None, slices=[{"sources": sources}]) == []


def test_an_adapters_names_and_shapes_are_its_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    name = f"{pair[0]}+{tmp_path / 'adapter'}"
    peeked = peek(name)
    assert (peeked.shapes, peeked.readable) == (peek(str(pair[0])).shapes, False)
    found = findings(tmp_path, [name, pair[1]])
    assert not [one for one in found if one.what not in ("sidecar", "adapter")]


def test_weights_that_no_mask_node_governs_are_not_looked_at(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = load_file(pair[0] / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    broken = torch.full_like(state[name], torch.nan)
    save_file(state | {name: broken}, pair[0] / "model.safetensors", {"format": "pt"})
    assert findings(tmp_path, pair) == []
    (pair[0] / "model.safetensors").write_bytes(b"cut")
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("error", "checkpoint")
    assert "cannot read model.safetensors" in detail


@pytest.mark.parametrize(("family", "extra"), [
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),  # A buffer in old files.
    ("gemma", {"lm_head.weight": torch.ones(64, 32)}),  # Tied to the embeddings, which are merged.
])  # fmt: skip
def test_what_is_tied_or_not_loaded_is_no_loss(
    family: str, extra: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folders = siblings(next(one for one in FAMILIES if one.name == family), tmp_path)
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        save_file(state | extra, folder / "model.safetensors", {"format": "pt"})
    assert not [one for one in findings(tmp_path, folders) if one.what != "sidecar"]


def test_a_model_that_counts_alone_needs_no_sidecar(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in pair:
        (folder / store.BESIDE).unlink()
    weights = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(pair, (0, 1), strict=True)
    ]
    assert only(findings(tmp_path, [pair[0]], models=weights))[:2] == ("warning", "weight")


def test_keys_that_nobody_reads(pair: tuple[Path, Path], tmp_path: Path) -> None:
    models = [{"model": str(model), "parameters": {"wieght": 2.0}, "fishr": {"data": "x"}} for model in pair]
    recipe = recipe_for(
        tmp_path, pair, models=models, parameters={"normalise": "model", "normalize": "model"}
    )
    found = [finding for finding in check_recipe(recipe) if finding.what == "recipe"]
    ignored = "mergekit ignores it, and merges without"
    assert [one.detail for one in found] == [
        *[f"fisher_mask has no parameter '{key}': {ignored}" for key in ("normalise", "wieght", "wieght")],
        *["nothing reads the key 'fishr'"] * 2,
    ]
    assert [one.remedy for one in found if one.level == "error"] == ["write normalize", *["write weight"] * 2]
    diagonal = check_recipe(
        recipe_for(tmp_path, pair, merge_method="fisher_diagonal", parameters={"nodes": "all"})
    )
    (found_there,) = [one for one in diagonal if one.what == "recipe"]
    assert (found_there.level, found_there.detail) == (
        "error",
        f"fisher_diagonal has no parameter 'nodes': {ignored}",
    )
    assert found_there.remedy == "remove it; there are weight, sidecar, normalize, prior, clip, missing"


def test_the_parameters_that_it_knows_are_the_methods() -> None:
    for method, shared in check_keys.OF_THE_MERGE.items():
        names = [one.name for one in get(method).spec.parameters]
        assert names == [*check_keys.OF_A_MODEL, *shared]


def test_a_value_for_the_merge_beside_a_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    models = [{"model": str(model), "parameters": {"weight": 1.0, "normalize": "model"}} for model in pair]
    recipe = recipe_for(tmp_path, pair, models=models)
    found = [finding for finding in check_recipe(recipe) if finding.what == "recipe"]
    assert [finding.detail for finding in found] == [
        "mergekit ignores 'normalize' beside a model: it is one value for all models"
    ] * 2
    assert found[0].remedy == "parameters: {normalize: model} at the top level of the recipe"


def test_data_that_is_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    models = [
        {"model": str(pair[0]), "fisher": {"data": str(tmp_path / "none.jsonl")}},
        {"model": str(pair[1])},
    ]
    (finding,) = [
        one for one in check_recipe(recipe_for(tmp_path, pair, models=models)) if one.what == "data"
    ]
    assert (finding.level, finding.detail.split(",")[0]) == (
        "warning",
        f"there is no {tmp_path / 'none.jsonl'}",
    )


def test_a_sidecar_that_was_measured_otherwise_than_the_recipe_asks(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    data = str(tiny.write_data(tmp_path / "data.jsonl"))
    for seed, folder in enumerate(pair):
        measure(folder, seed, settings=FisherSettings(data=data))
    recipe = recipe_for(tmp_path, pair, fisher={"data": data})
    assert check_recipe(recipe) == []
    recipe = recipe_for(tmp_path, pair, fisher={"data": data, "samples": 200, "estimator": "batch"})
    assert [f.detail.partition(" was ")[2] for f in check_recipe(recipe) if f.what == "sidecar"] == [
        "measured with samples 128, not 200, estimator 'sample', not 'batch'"
    ] * 2


def test_names_that_mergekit_cannot_use_as_they_are(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [f.what for f in check_recipe(recipe_for(tmp_path, ["./one", "./two"]))] == []
    found = check_recipe(recipe_for(tmp_path, ["one", "two"]))
    assert [f.detail.split(" when ")[0] for f in found] == [
        "mergekit asks the hub for 'one'",
        "mergekit asks the hub for 'two'",
    ]
    assert found[0].remedy == f"model: {pair[0]}"
    found = check_recipe(recipe_for(tmp_path, [f"{pair[0]}+{pair[1]}", str(pair[0])]))
    assert [f.remedy for f in found if f.what == "adapter"] == ["mergekit-yaml ... --lora-merge-cache FOLDER"]
    assert next(
        f.detail for f in check_recipe(recipe_for(tmp_path, [pair[0], "./none"])) if f.level == "error"
    ) == ("there is no folder ./none")


def test_a_recipe_for_the_full_fisher_information(tmp_path: Path) -> None:
    folder, data = tiny.checkpoint(tmp_path / "one"), tiny.write_data(tmp_path / "data.jsonl")
    other = tiny.sibling(tmp_path / "two", folder, seed=1)
    recipe = tmp_path / "recipe.yml"
    entries = ", ".join(
        f"{{model: {one}, fisher: {{data: {data}}}, parameters: {{weight: 1.0}}}}" for one in (folder, other)
    )
    recipe.write_text(
        f"merge_method: fisher_diagonal\nmodels: [{entries}]\nbase_model: {folder}\ndtype: float32\n"
        "fisher: {samples: 6}\n"
    )
    absent = [(one.level, one.what, one.detail) for one in check_recipe(recipe)]
    assert absent == [("error", "sidecar", f"there is none for {one}") for one in (folder, other)]
    for one in (folder, other):
        settings = FisherSettings(data=str(data), samples=6, kind="diagonal")
        compute(prepare(str(one), settings), torch.device("cpu"))
    assert check_recipe(recipe) == []
    recipe.write_text(recipe.read_text().replace("samples: 6", "samples: 5"))
    assert [found.detail.partition(" was ")[2] for found in check_recipe(recipe)] == [
        "measured with samples 6, not 5"
    ] * 2
    recipe.write_text(recipe.read_text().replace("samples: 5", "samples: 6"))
    tiny.sibling(other, folder, seed=2)
    (found,) = check_recipe(recipe)
    assert "has other values" in found.detail
    assert found.remedy == f"mergekit-fisher compute {recipe}"
    next((folder / "fisher" / "diagonal").glob("*.safetensors")).unlink()
    assert any("lacks diagonal_fisher-00001-of-00001" in found.detail for found in check_recipe(recipe))


def test_a_recipe_that_contains_itself_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text("merge_method: fisher_mask\nmodels: [{model: a}]\nx: &x [*x]\n")
    assert [finding.level for finding in check_recipe(tmp_path / "recipe.yml")].count("error") >= 1


def swapped(folder: Path, one: str, other: str) -> None:
    """Another tokenizer of the same size: two words in each other's place."""
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    words = whole["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(whole))


def test_tokens_that_have_other_ids_are_warned_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert findings(tmp_path, pair) == []
    swapped(pair[1], "w9", "w20")
    level, what, detail, remedy = only(findings(tmp_path, pair))
    assert (level, what) == ("warning", "vocabulary")
    assert f"'w9' is token 9 of {pair[0]} and token 20 of {pair[1]}" in detail
    assert "tokenizer: {source: base}" in remedy
    assert findings(tmp_path, pair, tokenizer={"source": "base"}) == []
    (pair[1] / "tokenizer.json").write_text("{}")
    level, what, detail, _ = only(findings(tmp_path, pair))
    assert (level, what) == ("warning", "vocabulary")
    assert str(pair[1]) in detail
