"""Several processes that measure together: what one gives, whatever their number; and how they end."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.prepass import Measured
from tests.launched import CASES, Case, launch, make, measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    make(made)
    return made


@lru_cache
def together(folder: Path, count: int) -> dict[str, Measured]:
    """What so many processes measured of every case."""
    for ended in launch([["-m", "tests.launched", folder]] * count):
        assert ended.code == 0, ended.stderr
    return torch.load(folder / f"{count}.pt", weights_only=False)


@lru_cache
def alone(folder: Path, case: str) -> Measured:
    return measured(next(one for one in CASES if str(one) == case), folder)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_processes_changes_nothing(folder: Path, count: int, case: Case) -> None:
    got, wanted = together(folder, count)[str(case)], alone(folder, str(case))
    tolerance: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-14}
    if case.settings.get("dtype") == "float32":
        tolerance = {"rtol": 1e-4, "atol": 1e-9}
    elif case.settings.get("kind") == "diagonal":  # float64 weights, so the sums are.
        tolerance = {"rtol": 1e-9, "atol": 1e-14}
    assert_close(got.fisher.fisher, wanted.fisher.fisher, **tolerance)
    assert got.fisher.samples == wanted.fisher.samples
    assert_close(got.fisher.loss, wanted.fisher.loss, rtol=1e-6, atol=0)
    assert got.fisher.accuracy == wanted.fisher.accuracy
    assert got.fisher.one_by_one == wanted.fisher.one_by_one
    assert_close(got.values, wanted.values, rtol=0, atol=0)
    assert got.notes == wanted.notes
