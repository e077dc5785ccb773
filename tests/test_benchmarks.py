import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

SPEED = Path(__file__).parent.parent / "benchmarks" / "speed.py"
ROWS = {
    "pre_pass_over_lower_bound",
    "recompute_over_lower_bound",
    "pre_pass_over_batch_gradients",
    "recompute_memory_over_lower_bound",
    "factored_over_pre_pass",
    "factored_over_lower_bound",
    "factored_memory_over_lower_bound",
    "factored_memory_beyond_model_over_lower_bound",
    "merge_nodes_all_seconds_over_linear",
    "merge_nodes_all_peak_over_linear",
    "factored_sidecar_over_checkpoint",
    "explicit_masks_over_pre_pass",
    "disagreement_with_explicit_masks",
    "full_fisher_over_pre_pass",
    "exact_full_fisher_over_pre_pass",
    "diagonal_over_pre_pass",
    "exact_diagonal_over_pre_pass",
    "diagonal_memory_over_lower_bound",
    "pre_pass_memory_over_lower_bound",
    "pre_pass_memory_beyond_model_over_lower_bound",
    "merge_fisher_mask_seconds_over_linear",
    "merge_fisher_mask_seconds_once_imported_over_linear",
    "merge_fisher_mask_peak_over_linear",
    "merge_fisher_diagonal_seconds_over_linear",
    "merge_fisher_diagonal_peak_over_linear",
    "merge_fisher_diagonal_peak_beyond",
    "import_torch_milliseconds",
    "import_torch_search_milliseconds",
    "import_torch_plug_in_milliseconds",
}


def test_the_benchmark_measures_every_row_and_both_ways_agree(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
    data = tiny.write_data(tmp_path / "data.jsonl", rows=6)
    before = sorted(path.name for path in checkpoint.iterdir())
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SPEED), "--checkpoint", str(checkpoint), "--data", str(data),
         "--samples", "6", "--repeats", "1", "--device", "cpu", "--merge-models", "3", "--json", str(out)],
        # At this size, threads only wait for each other.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows.keys() == ROWS
    for row in rows.values():
        assert math.isfinite(row["value"])
        line = next(line for line in done.stdout.splitlines() if line.startswith(row["title"]))
        assert ("<=" in line) == (row["target"] is not None)
    assert rows["disagreement_with_explicit_masks"]["value"] < 1e-4
    assert "; 3 inputs of " in rows["merge_fisher_mask_peak_over_linear"]["detail"]
    assert report["conditions"]["samples"] == 6
    # The checkpoint itself is only read.
    assert sorted(path.name for path in checkpoint.iterdir()) == before


@pytest.mark.parametrize(("options", "says"), [
    (["--data", "data.jsonl"], "--data needs a --checkpoint"),
    (["--merge-models", "1"], "--merge-models must be at least 2"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SPEED), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr
