import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.benchmarks import BENCHMARKS, benchmark

SPEED = BENCHMARKS / "speed.py"
ROWS = {
    "pre_pass_over_lower_bound",
    "recompute_over_lower_bound",
    "pre_pass_over_batch_gradients",
    "unchecked_over_lower_bound",
    "by_token_over_pre_pass",
    "by_token_over_lower_bound",
    "recompute_memory_beyond_model_over_lower_bound",
    "factored_over_pre_pass",
    "factored_over_lower_bound",
    "factored_memory_over_lower_bound",
    "factored_memory_beyond_model_over_lower_bound",
    "merge_nodes_all_seconds_over_linear",
    "merge_nodes_all_seconds_once_imported_over_linear",
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
    "merge_fisher_diagonal_seconds_once_imported_over_linear",
    "merge_fisher_diagonal_peak_over_linear",
    "merge_fisher_diagonal_peak_beyond",
    "import_torch_milliseconds",
    "import_torch_search_milliseconds",
    "import_torch_plug_in_milliseconds",
    "help_seconds",
}


def test_the_benchmark_measures_every_row_and_both_ways_agree(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "checkpoint")
    data = tiny.write_data(tmp_path / "data.jsonl", rows=6)
    before = sorted(path.name for path in checkpoint.iterdir())
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(SPEED), "--checkpoint", str(checkpoint), "--data", str(data), "--merge-gib", "0",
         "--samples", "6", "--repeats", "1", "--device", "cpu", "--merge-models", "3", "--only", "pre-pass,merge,start", "--json", str(out)],
        # At this size, threads only wait for each other.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [(table["part"], table["case"][:3]) for table in record["tables"]] == [
        ("Pre-pass", "che"),
        ("Merge", "3 x"),
        ("Start", "1 p"),
    ]
    rows = {row["name"]: row for table in record["tables"] for row in table["rows"]}
    assert rows.keys() == ROWS
    for row in rows.values():
        assert math.isfinite(row["value"])
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(row["title"]))
        assert (" <= " in line) == (row["target"] is not None)
    assert rows["disagreement_with_explicit_masks"]["value"] < 1e-4
    assert record["tables"][0]["conditions"]["samples"] == 6
    assert record["environment"]["threads"] == 1
    tables = benchmark("speed").markdown(record)
    assert [title.split(" (")[0] for title in tables] == ["Pre-pass", "Merge", "Start"]
    for row in rows.values():
        assert any(f"| {row['title']} " in table for table in tables.values())
    # The checkpoint itself is only read.
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def record_of(device: str, *cases: tuple[str, list[Any]]) -> dict[str, Any]:
    """A run's, with rows in place of measurements."""
    found = {
        "processor": "Intel(R) Xeon(R) CPU @ 2.50GHz", "threads": 2, "load_average": [0.5, 1, 1],
        "date": "2026-11-27T14:20:00+00:00", "versions": {"torch": "2.13.0+cpu"},
    }  # fmt: skip
    tables = [
        {"part": "Pre-pass", "case": case, "device": device, "rows": [row.record() for row in rows]}
        for case, rows in cases
    ]
    return {"environment": found, "tables": tables}


def test_a_table_names_its_hardware_and_what_falls_short() -> None:
    speed, row = benchmark("speed"), benchmark("ratios").Row
    time, full = partial(row, "a", "time", target=1.05), partial(row, "b", "full", target=57, at_least=True)
    tiny_rows = [time([1.0, 1.2, 1.1], "")]
    base_rows = [time([1.04], ""), full([60.0], "")]
    record = record_of("cpu", ("tiny", tiny_rows), ("base", base_rows))
    assert speed.markdown(record) == {
        "Pre-pass (Intel Xeon @ 2.50GHz, 2 threads; torch 2.13.0; 2026-11-27 14:20; load before it 0.5)": (
            "|      | target  | tiny                              | base  |\n"
            "| ---- | ------- | --------------------------------- | ----- |\n"
            "| time | <= 1.05 | 1.100 [1.000, 1.200]: falls short | 1.040 |\n"
            "| full | >= 57   |                                   | 60.00 |"
        )
    }
    assert speed.short_of(record["tables"]) == ["tiny: time"]
    assert full([56.0], "").verdict == "falls short"
    on_gpu = record_of("NVIDIA H200", ("base", base_rows))
    assert next(iter(speed.markdown(on_gpu))).startswith("Pre-pass (NVIDIA H200; ")


def test_runs_do_not_overwrite_each_other(tmp_path: Path) -> None:
    speed = benchmark("speed")
    found = record_of("cpu")["environment"]
    runs = [([], "cpu"), (["--only", "merge"], "cpu"), (["--shapes", "large"], "cpu"), ([], "NVIDIA H200")]
    names = [speed.destination(speed.parse_options(options), found, device).name for options, device in runs]
    assert len(set(names)) == len(runs)
    assert names[-1] == "speed-nvidia-h200-tiny-base.json"


def test_the_part_of_growth_has_the_exponents_with_a_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed = benchmark("speed")

    def curve(name: str, most: int, device: str) -> list[dict[str, Any]]:
        return [
            {"x": x, "wall": [x], "memory": x**2, "flops": x, "device": device}
            for x in (1.0, 2.0, 4.0)[:most]
        ]

    monkeypatch.setattr(speed, "pre_pass_curve", curve)
    (table,) = speed.growth_tables(speed.parse_options(["--device", "cpu"]), tmp_path)
    assert [(row["title"], round(row["value"], 6), row["verdict"]) for row in table["rows"]] == [
        ("samples: exponent of time", 1.0, "met"),
        ("samples: exponent of memory", 2.0, "falls short"),
        ("layers, --recompute: exponent of memory", 2.0, "falls short"),
        ("layers, --recompute: exponent of time by FLOPs", 1.0, "met"),
    ]


def test_the_goal_of_the_full_fisher_is_a_gpus() -> None:
    seconds = {"wall": [2.0], "processor": [2.0], "share": 0.5}
    ways = ("exact_full_fisher", "full_fisher", "exact_diagonal", "diagonal", "explicit_masks")
    timed: dict[str, Any] = {
        "seconds": dict.fromkeys(ways, seconds) | {"pre_pass": seconds},
        "disagreement": 0.0, "dtype": "float32", "labels": 2, "device": "NVIDIA H200",
    }  # fmt: skip
    rows = benchmark("ratios").full_fisher_rows(timed, "base")
    # What half of the tokens took stands for twice as much.
    assert (rows[0].value, rows[0].target, rows[0].at_least) == (2.0, 57, True)
    for other in (timed | {"device": "cpu"}, timed):
        shape = "base" if other["device"] == "cpu" else "large"
        assert benchmark("ratios").full_fisher_rows(other, shape)[0].target is None


@pytest.mark.parametrize(("options", "says"), [
    (["--data", "data.jsonl"], "--data needs a --checkpoint"),
    (["--merge-models", "1"], "--merge-models must be at least 2"),
    (["--only", "prepass"], "prepass is none of pre-pass, merge, start, growth"),
    (["--shapes", "huge"], "huge is none of tiny, base, large"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark("speed").parse_options(options)
    assert says in capsys.readouterr().err
