"""The command as a user types it: what it prints, writes and says of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import BertModel
from typer.testing import CliRunner, Result

from fisher_mask_mergekit import measure_mask, store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.execution import to_make_smaller
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from tests import tiny, tiny_tasks
from tests.families import FAMILIES, build


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def sidecars(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*mask_fisher*"))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_compute_measures_every_architecture(tmp_path: Path, data: Path, architecture: str) -> None:
    folder = tiny.checkpoint(tmp_path / architecture, architecture)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    out = run("compute", folder, "--data", data, "--samples", "12").stdout
    assert f"{folder}: 12 samples, accuracy 0." in out
    assert f"s on cpu, {folder / 'fisher' / 'mask_fisher.safetensors'}" in out
    sidecar = read(folder / store.BESIDE)
    assert [site.kind for site in sidecar.metadata.sites] == ["attention", "ffn"] * 2
    assert sidecar.metadata.settings.data == str(data)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_the_sidecar_says_what_was_measured(model: Path, data: Path) -> None:
    run(
        "compute",
        model,
        "--data",
        data,
        "--samples",
        "12",
        "--seed",
        "3",
        "--labels",
        "sampled",
        "--max-length",
        "9",
    )
    metadata = read(model / store.BESIDE).metadata
    assert (metadata.checkpoint, metadata.revision, metadata.samples) == (str(model), None, 12)
    assert (metadata.architecture, metadata.max_length) == ("BertForSequenceClassification", 9)
    assert (metadata.settings.seed, metadata.settings.labels, metadata.settings.estimator) == (
        3,
        "sampled",
        "sample",
    )
    assert (metadata.data.text, metadata.data.label, metadata.data.rows) == (("text",), "label", 24)
    assert metadata.versions["torch"] == version("torch")
    assert (metadata.device, metadata.data.label_map) == ("cpu", {"0": 0, "1": 1})


def test_variants_differ_and_each_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    def measured(*options: str) -> Sidecar:
        out = tmp_path / f"{'-'.join(options)}.safetensors"
        run("compute", model, "--data", data, "--samples", "12", "--out", out, *options)
        return read(out)

    plain = measured()
    output = "bert.encoder.layer.0.output.dense"
    for options in (
        ("--estimator", "batch", "--batch-size", "4"),
        ("--mask-placement", "pre"),
        ("--labels", "exact"),
        ("--labels", "sampled"),
        ("--dtype", "bfloat16"),
        ("--seed", "1"),
    ):
        other = measured(*options)
        assert other.metadata.settings != plain.metadata.settings
        with pytest.raises(AssertionError):
            assert_close(dict(other.fisher[output]), dict(plain.fisher[output]), rtol=1e-3, atol=0)
    for options in (("--batch-size", "5"), ("--batch-tokens", "20")):
        other = measured(*options)
        assert_close(dict(other.fisher[output]), dict(plain.fisher[output]), rtol=1e-4, atol=0)


def test_the_same_request_is_served_and_another_or_force_or_a_change_measures_anew(
    model: Path, data: Path
) -> None:
    def again(*options: str) -> bool:
        return "measured before" in run("compute", model, "--data", data, "--samples", "12", *options).stdout

    assert not again()
    assert again()
    assert not again("--seed", "1")
    assert again("--seed", "1")
    assert not again("--seed", "1", "--label-map", "0=0,1=1")
    assert again("--seed", "1", "--label-map", "0=0,1=1")
    assert not again("--seed", "1")
    assert not again("--seed", "1", "--force")
    assert again("--seed", "1", "--batch-size", "5")
    assert again("--seed", "1", "--batch-tokens", "50")
    assert not again("--seed", "1", "--estimator", "batch")
    assert again("--seed", "1", "--estimator", "batch", "--batch-size", "32")
    assert not again("--seed", "1", "--estimator", "batch", "--batch-size", "5")
    assert not again("--seed", "1")
    tiny.write_data(data, seed=5)
    assert not again("--seed", "1")
    tiny.checkpoint(model, seed=9)
    assert not again("--seed", "1")
    state = load_file(model / "model.safetensors")  # No mask node governs the head, and yet it counts.
    save_file(
        state | {"classifier.weight": -state["classifier.weight"]},
        model / "model.safetensors",
        {"format": "pt"},
    )
    assert not again("--seed", "1")
    (model / store.BESIDE).write_bytes(b"broken")
    assert not again("--seed", "1")
    assert again("--seed", "1")


def test_fewer_rows_than_asked_uses_all_and_says_so(model: Path, data: Path) -> None:
    result = run("compute", model, "--data", data)
    assert "has 24 rows, 128 were asked for: used all" in result.stderr
    assert read(model / store.BESIDE).metadata.samples == 24
    assert "used all" in run("compute", model, "--data", data).stderr


def test_labels_that_do_not_match_are_warned_of_loudly(model: Path, data: Path, tmp_path: Path) -> None:
    """Labels that the checkpoint itself gives, swapped: accuracy 0."""
    from transformers import pipeline

    classify = pipeline("text-classification", str(model))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    swapped = [row | {"label": 1 - int(classify(row["text"])[0]["label"][-1])} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    result = run("compute", model, "--data", data)
    assert "accuracy 0.000" in result.stdout
    assert "WARNING: accuracy on the samples is 0.000, no better than always guessing" in result.stderr
    few = run("compute", model, "--data", data, "--samples", "15")
    assert "accuracy 0.000" in few.stdout
    assert "WARNING" not in few.stderr
    assert "WARNING" in run("compute", model, "--data", data, "--samples", "16").stderr
    result = run("compute", model, "--data", data, "--label-map", "0=1,1=0")
    assert "accuracy 1.000" in result.stdout
    assert "WARNING" not in result.stderr


def test_a_checkpoint_without_a_padding_token_is_measured_one_by_one(tmp_path: Path, data: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "padless", "llama", pad_token_id=None)
    padded = tiny.checkpoint(tmp_path / "padded", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run("compute", folder, "--data", data)
    assert "has no padding token: measuring one sample at a time" in result.stderr
    run("compute", padded, "--data", data)
    one, other = read(folder / store.BESIDE), read(padded / store.BESIDE)
    for output, vectors in one.fisher.items():
        assert_close(dict(vectors), dict(other.fisher[output]), rtol=1e-3, atol=1e-9)
    assert "no padding token, so estimator 'batch'" in run(
        "compute", folder, "--data", data, "--estimator", "batch", code=1
    ).stderr  # fmt: skip


def test_a_decoder_whose_padding_ids_disagree_is_measured_right(tmp_path: Path, data: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "llama", pad_token_id=3)
    for size in ("1", "32"):
        run("compute", folder, "--data", data, "--batch-size", size, "--out", tmp_path / size)
    one, other = read(tmp_path / "1"), read(tmp_path / "32")
    for output, vectors in one.fisher.items():
        assert_close(dict(vectors), dict(other.fisher[output]), rtol=1e-3, atol=1e-9)


def test_nothing_but_a_sidecar_is_overwritten(model: Path, data: Path, tmp_path: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    for out in (model / "model.safetensors", tmp_path):
        result = run("compute", model, "--data", data, "--out", out, code=1)
        assert "exists and is no sidecar; it was left as it is" in result.stderr
    assert (model / "model.safetensors").read_bytes() == before


def test_a_recipe_is_looked_into_as_a_whole_before_anything_is_measured(
    tmp_path: Path, model: Path, data: Path
) -> None:
    other = tiny.sibling(tmp_path / "other", model, seed=1)
    recipe = tmp_path / "recipe.yml"
    entry = "{model: MODEL, fisher: {data: DATA}}"
    entries = [
        entry.replace("MODEL", str(model)).replace("DATA", str(data)),
        entry.replace("MODEL", str(other)).replace("DATA", "none.jsonl"),
    ]
    recipe.write_text(f"merge_method: fisher_mask\nmodels: [{', '.join(entries)}]")
    assert "there is no data file none.jsonl" in run("compute", recipe, code=1).stderr
    assert sidecars(tmp_path) == []
    both = [
        f"{{model: {one}, fisher: {{data: {data}}}, parameters: {{sidecar: same}}}}" for one in (model, other)
    ]
    recipe.write_text(f"merge_method: fisher_mask\nmodels: [{', '.join(both)}]")
    said = run("compute", recipe, code=1).stderr
    assert (
        "two models have the same sidecar: same; give each one of its own:  parameters: {sidecar: PATH}"
        in said
    )


def test_a_merge_that_would_use_another_sidecar_is_said_every_time(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("compute", model, "--data", data)
    monkeypatch.setattr(store.os, "access", lambda path, mode: False)
    for _ in range(2):
        assert f"a merge prefers {model / store.BESIDE}; to use this one" in run(
            "compute", model, "--data", data, "--seed", "5"
        ).stderr  # fmt: skip


def test_files_in_torchs_old_format_with_old_names(model: Path, data: Path) -> None:
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in state.items()}, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # fmt: skip
    assert "only" not in run("compute", model, "--data", data).stderr.replace("read-only", "")
    assert len(read(model / store.BESIDE).metadata.sites) == 4


def test_a_pytorch_bin_checkpoint_and_a_sharded_one(tmp_path: Path, model: Path, data: Path) -> None:
    run("compute", model, "--data", data)
    wanted = read(model / store.BESIDE)
    state = load_file(model / "model.safetensors")
    pickled = shutil.copytree(
        model, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors", "fisher")
    )
    torch.save(state, pickled / "pytorch_model.bin")
    sharded = shutil.copytree(
        model, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors", "fisher")
    )
    names = sorted(state)
    where = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file(
            {name: state[name] for name in names if where[name] == file}, sharded / file, {"format": "pt"}
        )
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for folder in (pickled, sharded):
        run("compute", folder, "--data", data)
        got = read(folder / store.BESIDE)
        assert got.metadata.sites == wanted.metadata.sites
        for output, vectors in wanted.fisher.items():
            assert_close(dict(got.fisher[output]), dict(vectors), rtol=1e-5, atol=0)
        for name, values in wanted.values.items():
            assert_close(got.values[name], values, rtol=0, atol=0)


def test_a_recipe_measures_all_its_models(tmp_path: Path, model: Path, data: Path) -> None:
    other = tiny.sibling(tmp_path / "other", model, seed=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher_mask\nfisher: {{samples: 6, data: '{data}'}}\nmodels:\n"
        f"  - model: {model}\n  - model: {other}\n    fisher: {{seed: 1}}\n"
        f"    parameters: {{sidecar: '{tmp_path / 'elsewhere.safetensors'}'}}\n"
    )
    out = run("compute", recipe, "--batch-size", "3").stdout
    assert [line.split(":")[0] for line in out.splitlines()] == [str(model), str(other)]
    assert read(model / store.BESIDE).metadata.settings.seed == 0
    assert read(tmp_path / "elsewhere.safetensors").metadata.settings.seed == 1
    assert not (other / store.BESIDE).exists()
    assert "--out takes one model" in run("compute", recipe, "--out", tmp_path / "x", code=1).stderr


def test_a_recipe_with_another_method_is_measured_and_says_so(
    tmp_path: Path, model: Path, data: Path
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {model}, fisher: {{data: {data}}}}}]")
    assert "merge_method is linear, which uses no sidecars" in run("compute", recipe).stderr
    assert (model / store.BESIDE).is_file()


def test_a_model_without_data_needs_a_sidecar(tmp_path: Path, model: Path, data: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: fisher_mask\nmodels: [{{model: {model}}}]")
    assert "has no sidecar and no data to measure it on" in run("compute", recipe, code=1).stderr
    run("compute", model, "--data", data)
    assert f"no data in the recipe; its sidecar is {model / store.BESIDE}" in run("compute", recipe).stderr
    other = tiny.sibling(tmp_path / "other", model, seed=1)
    recipe.write_text(
        f"merge_method: fisher_mask\nmodels:\n  - {{model: {other}, fisher: {{data: {data}}}}}\n"
        f"  - {{model: {model}, parameters: {{sidecar: nowhere/x.safetensors}}}}\n"
    )
    said = run("compute", recipe, code=1).stderr
    assert (
        f"{model} has no data to measure it on, and its sidecar nowhere/x.safetensors does not exist" in said
    )
    assert not (other / store.BESIDE).exists()


def test_a_read_only_checkpoint_is_served_from_the_cache(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.os, "access", lambda path, mode: False)
    out = run("compute", model, "--data", data).stdout
    assert str(store.cache_folder()) in out
    assert sidecars(model) == []
    assert "measured before" in run("compute", model, "--data", data).stdout


def _breaks(folder: Path, case: str) -> None:
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if case == "no config":
        (folder / "config.json").unlink()
    elif case == "config not JSON":
        (folder / "config.json").write_text("{")
    elif case == "index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "truncated weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    elif case == "no head":
        save_file({k: v for k, v in state.items() if "classifier" not in k}, folder / "model.safetensors")
    elif case == "other names":
        save_file(
            {k.replace("query", "quest").replace("inter", "enter"): v for k, v in state.items()},
            folder / "model.safetensors",
        )
    elif case == "nan":
        state["bert.embeddings.word_embeddings.weight"][:] = torch.nan
        save_file(state, folder / "model.safetensors")
    elif case == "causal":
        config["architectures"] = ["BertLMHeadModel"]
    elif case == "no head class":
        config["architectures"] = ["BertModel"]
    elif case == "one label":
        config |= {
            "problem_type": "single_label_classification",
            "id2label": {"0": "x"},
            "label2id": {"x": 0},
        }
    elif case == "heads":
        config["num_attention_heads"] = 5
    if case in ("causal", "no head class", "heads"):
        (folder / "config.json").write_text(json.dumps(config))


def test_what_a_models_own_code_refuses_is_one_error(tmp_path: Path, data: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "chunked", chunk_size_feed_forward=4)
    said = run("compute", folder, "--data", data, code=1).stderr
    assert "(BertForSequenceClassification) cannot be run on these samples: ValueError: The dimension" in said
    assert sidecars(tmp_path) == []


def test_a_sidecar_of_another_table_is_not_served(model: Path, data: Path) -> None:
    run("compute", model, "--data", data, "--samples", "8")
    place = model / store.BESIDE
    old = read(place)
    fewer = old.metadata.sites[:-1]
    values = {
        name: value
        for name, value in old.values.items()
        if name in {t.name for s in fewer for t in s.tensors}
    }
    fisher = {site.output: old.fisher[site.output] for site in fewer}
    write(Sidecar(old.metadata.model_copy(update={"sites": fewer}), fisher, values), place)
    assert "measured before" not in run("compute", model, "--data", data, "--samples", "8").stdout
    assert "measured before" in run("compute", model, "--data", data, "--samples", "8").stdout


def test_two_models_with_one_place_are_one_error(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    entries = [f"{{model: {name}, fisher: {{data: {data}}}}}" for name in (f"./{model.name}", model)]
    (tmp_path / "twice.yml").write_text(f"merge_method: fisher_mask\nmodels: [{', '.join(entries)}]\n")
    said = run("compute", tmp_path / "twice.yml", code=1).stderr
    assert f"two models would be written to {model / store.BESIDE}" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}', "is not an index of weights"),
        ("pytorch_model.bin", [1, 2], "pytorch_model.bin holds other things than tensors"),
    ],
)
def test_weight_files_that_are_none_are_one_error(
    model: Path, data: Path, name: str, content: object, message: str
) -> None:
    (model / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (model / name).write_bytes(content)
    else:
        torch.save(content, model / name)
    assert message in run("compute", model, "--data", data, code=1).stderr


def test_a_class_without_a_head_is_one_error_also_with_a_task(tmp_path: Path, data: Path) -> None:
    folder = tiny.save(BertModel(tiny.config_of("bert")), tmp_path / "headless")
    said = run("compute", folder, "--data", data, "--task", "sequence-classification", code=1).stderr
    assert f"{folder} is a BertModel, which has no head, and so no loss" in said


@pytest.mark.parametrize("kind", ["mask", "diagonal"])
def test_replacing_a_measurement_with_other_settings_is_said(model: Path, data: Path, kind: str) -> None:
    given = ("compute", model, "--data", data, "--kind", kind, "--samples")
    assert "replaced" not in run(*given, "8").stderr
    said = run(*given, "12").stderr
    assert "replaced the sidecar measured with samples 8; --out keeps both" in said


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(data: Path) -> None:
    assert "there is no folder ./nope" in run("compute", "./nope", "--data", data, code=1).stderr


def test_a_model_without_mask_nodes_is_one_error(tmp_path: Path, data: Path) -> None:
    mamba = next(family for family in FAMILIES if family.name == "mamba")
    folder = tiny.save(build(mamba), tmp_path / "mamba")
    said = run("compute", folder, "--data", data, code=1).stderr
    assert f"no mask site is known for {folder} (MambaForCausalLM); its tensors begin with backbone" in said


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no config", "has no config.json"),
        ("config not JSON", "config.json is not JSON"),
        ("index", "model.safetensors.index.json is not an index of weights"),
        ("no weights", "has no model.safetensors or pytorch_model.bin"),
        ("truncated weights", "cannot read model.safetensors"),
        (
            "no head",
            "has no classifier.bias, classifier.weight: it is not a complete BertForSequenceClassification",
        ),
        ("other names", "has no bert.encoder.layer.0.attention.self.query.bias, .* it is not a complete"),
        ("nan", "the loss of sample .* is nan"),
        ("causal", "is a BertLMHeadModel whose configuration says is_decoder: false"),
        ("no head class", "is a BertModel, which does not tell what it predicts; .* with --task"),
        ("heads", "transformers cannot load .*: The hidden size \\(32\\) is not a multiple"),
    ],
)
def test_a_bad_checkpoint_is_one_error_and_nothing_is_written(
    model: Path, data: Path, case: str, message: str
) -> None:
    import re

    _breaks(model, case)
    result = run("compute", model, "--data", data, code=1)
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert sidecars(model.parent) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "say what to measure .* on:  mergekit-fisher compute .* --data DATASET"),
        (["MODEL", "--data", "DATA", "--label-map", "0"], "--label-map: expected DATA=CHECKPOINT pairs"),
        (["MODEL", "--data", "DATA", "--text", "nope"], "has no column 'nope'; its columns are text, label"),
        (["MODEL", "--data", "DATA", "--device", "meta"], "device 'meta' cannot be used"),
        (["MODEL", "--data", "DATA", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["MODEL", "--data", "DATA", "--out", "MODEL/config.json/x"], "cannot write .*; nothing was written"),
        (["MODEL+adapter", "--data", "DATA"], "cannot apply adapter to .*model: Can't find 'adapter_config"),
        (["none.yml"], "cannot read recipe none.yml: No such file"),
        (["DATA"], "data.jsonl is not YAML"),
    ],
)
def test_bad_options_are_one_error(model: Path, data: Path, arguments: list[str], message: str) -> None:
    import re

    filled = [
        part.replace("MODEL", str(model)).replace("DATA", str(data)) if part != "none.yml" else part
        for part in arguments
    ]
    result = run("compute", *filled, code=1)
    assert re.search(message, result.stderr), result.stderr
    assert sidecars(model.parent) == []


@pytest.mark.parametrize(
    ("option", "least"),
    [("--samples", 1), ("--seed", 0), ("--max-length", 2), ("--batch-size", 1), ("--batch-tokens", 1)],
)
def test_numbers_out_of_range_are_usage_errors(option: str, least: int) -> None:
    said = run("compute", "model", "--data", "data", option, str(least - 1), code=2).stderr
    assert f"Invalid value for '{option}': " in said
    assert str(least) in said.rpartition(":")[2]


def test_no_such_checkpoint(data: Path) -> None:
    result = run("compute", "nosuch/model", "--data", data, code=1)
    assert "nosuch/model is neither a folder here nor a checkpoint to be had from the hub: " in result.stderr


def test_too_little_memory_says_what_to_do(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure_mask, "mask_fisher", full)
    assert f"too little memory for {model}; take a smaller --batch-tokens or max_length, --recompute, or dtype" in run(
        "compute", model, "--data", data, code=1
    ).stderr  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "--batch-tokens or max_length, --recompute"),
        ({"estimator": "batch"}, "batch_size or max_length, --recompute"),
        ({"kind": "diagonal"}, "--batch-tokens or max_length"),
    ],
)
def test_where_memory_lacks_nothing_is_advised_that_would_be_refused(
    settings: dict[str, Any], advice: str
) -> None:
    assert to_make_smaller(FisherSettings(**settings)) == advice


def test_ctrl_c_leaves_no_file(tmp_path: Path, model: Path) -> None:
    data = tiny.write_data(tmp_path / "much.jsonl", rows=2000)
    data.write_text(data.read_text() * 100)
    process = subprocess.Popen(
        [Path(sys.executable).with_name("mergekit-fisher"), "compute", model, "--data", data,
         "--samples", "200000", "--batch-size", "2"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        # A runner in the background ignores this signal, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            while process.poll() is None and not list(tmp_path.glob("hf/**/*.arrow")):
                time.sleep(0.1)
            time.sleep(3)  # The data is read; now it tokenises, loads the model, or measures.
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "interrupted; no half-written file was left" in errors
    assert "Traceback" not in errors
    assert sidecars(tmp_path) == []


def test_version_and_help() -> None:
    from fisher_mask_mergekit import __version__

    assert run("--version").stdout == f"{__version__}\n"
    assert "compute" in run("--help").stdout


def test_a_label_map_of_numbers_is_the_same_request_again(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    fisher = f"{{data: {data}, samples: 8, label_map: {{0: 1, 1: 0}}}}"
    recipe.write_text(f"merge_method: fisher_mask\nmodels:\n  - {{model: {model}, fisher: {fisher}}}\n")
    assert "measured before" not in run("compute", recipe).stdout
    again = run("compute", recipe)
    assert "measured before" in again.stdout
    assert "replaced" not in again.stderr


@pytest.mark.parametrize("head", [0.0, 5.0])
def test_a_language_models_loss_beyond_guessing_is_warned_of(head: float, data: Path, tmp_path: Path) -> None:
    """As with another model's tokenizer; a head of zeros guesses."""
    model = tiny_tasks.model("llama-causal")
    torch.nn.init.normal_(model.get_parameter("lm_head.weight"), std=head)
    folder = tiny.save(model, tmp_path / "lm")
    result = run("compute", folder, "--data", data)
    told = "nats a token, where guessing evenly among all tokens costs 4.16" in result.stderr
    assert told == (head > 0)
    assert "WARNING" not in run("compute", folder, "--data", data, "--samples", "15").stderr
