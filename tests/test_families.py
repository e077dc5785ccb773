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
