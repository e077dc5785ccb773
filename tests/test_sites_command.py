"""`mergekit-fisher sites`: what is measured and what is averaged, without reading a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.skeleton import sites_of
from tests import tiny
from tests.families import FAMILIES, REMOTE, Family, build

BY_NAME = {family.name: family for family in FAMILIES}


def sites(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["sites", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def saved(family: Family, folder: Path) -> Any:
    model = build(family)
    model.save_pretrained(folder)
    return model


def test_the_text_names_tensors_rows_counts_and_what_is_averaged(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "llama", num_hidden_layers=3)
    text = sites(folder)
    assert text.startswith(f"{folder}: LlamaForSequenceClassification, 6 sites\n")
    for line in (
        "model.layers.*.self_attn.o_proj, layers 0-2",
        "  4 heads of 8, 2 key-value heads",
        "  model.layers.*.self_attn.q_proj.weight [32, 32]: 8 rows per query head",
        "  model.layers.*.self_attn.k_proj.weight [16, 32]: 8 rows per key-value head",
        "  48 neurons",
        "  model.layers.*.mlp.up_proj.weight [48, 32]: 1 row per neuron",
        "  model.layers.*.self_attn.v_proj.weight [16, 32]: 8 rows per key-value head; averaged unless values: true",
        "  model.layers.*.self_attn.o_proj.weight [32, 32]: 8 columns per query head; averaged unless values: true",
        "  model.layers.*.mlp.down_proj.weight [32, 48]: 1 column per neuron; averaged unless nodes: columns",
        "averaged (9 tensors):",
        "  model.layers.*.input_layernorm.weight [32], layers 0-2",
        "  score.weight [2, 32]",
    ):
        assert f"{line}\n" in text, line
    averaged = text.partition("\naveraged (")[2]
    assert "_proj" not in averaged


@pytest.mark.parametrize(("family", "lines"), [
    ("gpt2", ["c_attn.weight [32, 96]: 8 rows per query head, then 8 per key head; those of values averaged unless values: true, along axis 1", "mlp.c_proj.weight [56, 32]: 1 column per neuron, along axis 0; averaged unless nodes: columns"]),
    ("gpt-neox", ["query_key_value.weight [96, 32]: per key-value head 8 rows of each query head and 8 of its key; those of its value averaged unless values: true"]),
    ("deepseek-v2", ["kv_b_proj.weight [72, 12]: 18 rows per head, the last 10 of its value averaged unless values: true"]),
    ("phi3", ["gate_up_proj.weight [112, 32]: 2 rows per neuron, all first ones before all second ones"]),
    ("gpt-oss", ["gate_up_proj [4, 32, 80]: 2 rows per neuron, one after the other, along axis 2", "down_proj [4, 40, 32]: 1 column per neuron, along axis 1; averaged unless nodes: columns"]),
    ("mixtral", ["  40 neurons in each of 4 experts", "experts.*.w1.weight [40, 32] x 4: 1 row per neuron",
                 "gate_up_proj [4, 80, 32]: 2 rows per neuron, all first ones before all second ones, along axis 1; this name only in the loaded model",
                 "experts.*.w2.weight [32, 40] x 4: 1 column per neuron; averaged unless nodes: columns"]),
    ("mamba", ["no mask node is known for it: a merge averages all of it"]),
])  # fmt: skip
def test_layouts_in_words(tmp_path: Path, family: str, lines: list[str]) -> None:
    saved(BY_NAME[family], tmp_path)
    text = sites(tmp_path)
    for line in lines:
        assert f"{line}\n" in text, text


@pytest.mark.parametrize("family", ["bert-sequence", "mixtral", "qwen2.5-vl", "deepseek-v3-dense-first"])
def test_json_has_everything(tmp_path: Path, family: str) -> None:
    model = saved(BY_NAME[family], tmp_path)
    answer = json.loads(sites(tmp_path, "--json"))
    assert list(answer) == ["checkpoint", "architecture", "is_checked", "sites", "averaged"]
    assert (answer["checkpoint"], answer["architecture"]) == (str(tmp_path), type(model).__name__)
    assert answer["is_checked"] is True
    stored = tensor_shapes(locate(str(tmp_path)))
    found = sites_of(model, stored)
    assert answer["sites"] == [site.model_dump(mode="json") for site in found]
    governed = {tensor.name for site in found for tensor in site.tensors if tensor.layout != "mean"}
    assert answer["averaged"].keys() == stored.keys() - governed


def remote_folder(folder: Path, name: str, **config: Any) -> Path:
    remote = next(remote for remote in REMOTE if remote.name == name)
    save_file(
        {name: torch.zeros(shape) for name, shape in remote.tensors.items()}, folder / "model.safetensors"
    )
    document = {"architectures": ["OwnModel"], "model_type": name, "auto_map": {}} | config
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_a_class_that_transformers_does_not_have_goes_by_names_and_says_so(tmp_path: Path) -> None:
    folder = remote_folder(tmp_path, "internlm2", num_attention_heads=4)
    text = sites(folder)
    assert "found by the tensors' names alone, not checked on the model" in text
    assert "model.layers.*.attention.wo, layers 0-1\n  4 heads of 8, 2 key-value heads\n" in text
    assert json.loads(sites(folder, "--json"))["is_checked"] is False


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    assert "does not say how many heads it has" in sites(remote_folder(tmp_path, "qwen"), code=1)
    folder = tiny.checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    message = sites(folder, code=1)
    assert "CheckpointError" in message
    assert "5" in message
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors or pytorch_model.bin" in sites(folder, code=1)


@pytest.mark.parametrize("command", ["sites", "init"])
def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_asked_about(
    tmp_path: Path, command: str
) -> None:
    folders = [tiny.checkpoint(tmp_path / "one"), tiny.checkpoint(tmp_path / "two", labels=3)]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "unknown", "auto_map": {"AutoConfig": "evil.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import BertConfig\nclass Config(BertConfig): pass\n"
        )
    result = CliRunner().invoke(
        app, [command, *map(str, folders[: 1 if command == "sites" else 2])], input="y\ny\n"
    )
    assert result.exit_code == 1
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in result.output
