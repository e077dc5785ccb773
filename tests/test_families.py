"""The tables of tiny models are sound: each can be made, run, saved and loaded, and mergekit's own list is covered."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, REMOTE, Family, build, inputs
from tests.families.perturbation import changed, heard

BY_NAME = {family.name: family for family in FAMILIES}
ARCHITECTURES = files("mergekit") / "_data" / "architectures"
NAMES = [
    entry.name.removesuffix(".json") for entry in ARCHITECTURES.iterdir() if entry.name.endswith(".json")
]


def tensors(output: Any) -> Iterator[Tensor]:
    """What a model puts out, without its caches."""
    for name, value in output.items():
        if isinstance(value, Tensor) and "cache" not in name:
            yield value


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family_runs_and_reloads(family: Family, tmp_path: Path) -> None:
    model, batch = build(family), inputs(family)
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        before = list(tensors(model(**batch)))
    assert before
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        after = list(tensors(again.eval()(**batch)))
    for first, second in zip(before, after, strict=True):
        assert first.isfinite().all()
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_sample_is_the_same_in_every_batch(family: Family) -> None:
    together, first, second = inputs(family), inputs(family, 1), inputs(family, 1, first=1)
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([first[name], second[name]]))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_parameter_is_perturbed(family: Family) -> None:
    # What is zero or one throughout counts for nothing, or hides that it counts.
    still = [
        name
        for name, parameter in build(family).named_parameters()
        if parameter.unique().numel() < parameter.numel() / 2
    ]
    assert not still


def test_names_are_unique() -> None:
    names = [family.name for family in FAMILIES] + [f"remote {remote.name}" for remote in REMOTE]
    assert len(set(names)) == len(names)


def test_every_architecture_of_mergekit_has_a_row() -> None:
    assert {family.json for family in FAMILIES if family.json} | {remote.name for remote in REMOTE} == set(
        NAMES
    )


@pytest.mark.parametrize("remote", [row for row in REMOTE if row.name != "phi-1"], ids=str)
def test_remote_tensors_are_those_of_mergekits_file(remote: Any) -> None:
    described = json.loads((ARCHITECTURES / f"{remote.name}.json").read_text())
    layers = [
        weight["name"].replace("${layer_index}", str(index))
        for index in remote.layers
        for weight in described["layer_templates"]["weights"]
    ]
    outside = [weight["name"] for weight in described["pre_weights"] + described["post_weights"]]
    assert set(remote.tensors) == {*layers, *outside}


@pytest.mark.parametrize("remote", REMOTE, ids=str)
def test_remote_output_projections_exist(remote: Any) -> None:
    attention, ffn = (f"{remote.prefix.format(remote.first)}{out}.weight" for out in remote.out)
    axis = 0 if remote.conv1d else 1
    assert remote.tensors[attention][axis] % remote.heads[0] == 0
    assert remote.tensors[ffn][axis] == remote.neurons


def test_moved_query_rows_change_their_head_only() -> None:
    model, batch = build(BY_NAME["llama"]), inputs(BY_NAME["llama"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = "model.layers.1.self_attn"
    moved = changed(model, batch, f"{attention}.o_proj", f"{attention}.q_proj.weight", range(12, 24))
    assert moved.nonzero().flatten().tolist() == list(range(12, 24))
    # Two query heads share a key.
    moved = changed(model, batch, f"{attention}.o_proj", f"{attention}.k_proj.weight", range(12, 24))
    assert moved.nonzero().flatten().tolist() == list(range(24, 48))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_moved_columns_of_a_conv1d_change_their_neuron_only() -> None:
    model, batch = build(BY_NAME["gpt2"]), inputs(BY_NAME["gpt2"])
    moved = changed(
        model, batch, "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc.weight", [7], axis=1
    )
    assert moved.nonzero().flatten().tolist() == [7]


def test_rows_of_a_muted_expert_neuron_go_unheard() -> None:
    model, batch = build(BY_NAME["mixtral"]), inputs(BY_NAME["mixtral"], 4)
    gate_up, down = (f"model.layers.0.mlp.experts.{kind}_proj" for kind in ("gate_up", "down"))
    for row in (5, 45):
        assert not heard(model, batch, gate_up, (2, row), down, (2, slice(None), 5))
        assert heard(model, batch, gate_up, (2, row), down, (2, slice(None), 6))
