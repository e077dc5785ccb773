from pathlib import Path

import pytest
import torch

from fisher_mask_mergekit.settings import FisherSettings
from tests import tiny
from tests.benchmarks import benchmark


def test_likeness_is_measured_of_every_matrix(tmp_path: Path) -> None:
    likeness = benchmark("likeness")
    checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
    settings = FisherSettings(data=str(tiny.write_data(tmp_path / "data.jsonl", rows=6)), samples=6)
    found: dict[str, object] = {}
    likeness.compare(str(checkpoint), settings, torch.device("cpu"), found)
    (query,) = (line for name, line in found.items() if "query.weight" in name)
    assert 0 < min(query.rows_and_columns) <= 1  # type: ignore[attr-defined]
    assert -1 <= min(query.kfac) <= 1  # type: ignore[attr-defined]
    assert "query.weight" in likeness.table(list(found.values()))


def test_a_correlation_is_of_square_roots() -> None:
    correlation = benchmark("likeness").correlation
    squares = torch.tensor([1.0, 4.0, 9.0])
    assert correlation(squares, 4 * squares) == pytest.approx(1.0)
    assert correlation(squares, (6 - squares.sqrt()).square()) == pytest.approx(-1.0)
    assert correlation(squares, torch.ones(3)) is None
