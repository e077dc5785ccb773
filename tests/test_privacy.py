"""The benchmark of what a sidecar reveals, whole, on a tiny model; and its measurements against the pre-pass."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar
from tests import tiny
from tests.benchmarks import benchmark


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return tiny.checkpoint(tmp_path / "model"), tiny.write_data(tmp_path / "data.jsonl", rows=30)


def test_the_mean_of_single_rows_is_what_compute_writes(inputs: tuple[Path, Path]) -> None:
    privacy, (model, data) = benchmark("privacy"), inputs
    rows = privacy.measure_rows(model, FisherSettings(data=str(data), samples=9))
    sidecar = compute(
        prepare(str(model), FisherSettings(data=str(data), samples=9)), torch.device("cpu")
    ).sidecar
    assert isinstance(sidecar, Sidecar)
    made = privacy.sidecar_of(rows, range(9))
    assert len(made) == 4
    for (output, node), vector in made.items():
        assert_close(vector.float(), sidecar.fisher[output][node], rtol=1e-4, atol=1e-9)


def test_members_are_told_where_theory_says_so(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    out = tmp_path / "privacy.json"
    small = ["--samples", "1,6", "--reference", "8", "--outside", "8", "--trials", "3", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["privacy", str(model), str(data), *small])
    monkeypatch.setattr(privacy := benchmark("privacy"), "RESAMPLES", 20)
    privacy.main()
    record = json.loads(out.read_text())
    assert record["rows"] == 22
    assert str(tmp_path) not in out.read_text()
    one, six = record["attacks"]
    # A single row's sidecar is its own Fisher information; with more, all rows are needed to tell them apart.
    assert one["auc"]["bound"]["value"] == one["proven_absent"]["value"] == 1
    assert six["auc"]["all rows known"]["value"] == 1
    assert six["proven_absent"]["value"] < 1
    for attack in record["attacks"]:
        assert attack["wrongly_proven_absent"] == 0
    caught = record["caught"]
    for name, by in caught.items():
        shares = list(by.values())
        assert shares[-1] == (0 if name == "not altered" else 1), name
        assert shares == sorted(shares), name
    assert set(caught["one head x 1.5"].values()) == {0, 1}
