"""How fast and how lean the pre-pass, the merge and `import torch` are, against what they could be.

    python benchmarks/speed.py [--checkpoint FOLDER] [--data FILE] [--samples 128] [--repeats 5]
                               [--device auto] [--merge-gib N] [--merge-models M] [--json OUT]

Prints ratios beside their targets. Without a checkpoint, a random classifier of BERT-base's shape is made;
without data, random text. ``--merge-gib`` merges random checkpoints of about that size instead, bfloat16 in shards.
Everything is measured in processes of their own. Needs a POSIX system, and room for four copies of each checkpoint;
TMPDIR says where, OMP_NUM_THREADS how many threads.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import import_runs, memory_runs, merge_runs, run_script

MIB = 2**20
IMPORTS = 20
MERGE_SAMPLES = 8
"""Samples that the sidecars for ``--merge-gib`` are measured on: no merge's cost depends on their number."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What is measured, for programs.
        title: The same, for people.
        value: A number in ``unit``.
        unit: ``x`` for a ratio, or ``ms``; empty for a bare number.
        target: The most it should be, if there is such a target.
        detail: How it was measured, and how it varied.
    """

    name: str
    title: str
    value: float
    unit: str
    target: float | None
    detail: str

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty if there is none."""
        if self.target is None:
            return ""
        return "met" if self.value <= self.target else "FALLS SHORT"


def ratios_of(tops: Sequence[float], bottoms: Sequence[float]) -> list[float]:
    """Ratios of runs that were neighbours in time."""
    return [top / bottom for top, bottom in zip(tops, bottoms, strict=False)]


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return "one run"
    return f"median of {len(values)}, {min(values):.3g} to {max(values):.3g}"


def pre_pass_rows(timed: dict[str, Any]) -> list[Row]:
    """Row 1: the pre-pass against the least that one backward pass takes, and against one gradient per batch."""
    rows = []
    for name, title, way, other, target in (
        ("pre_pass_over_lower_bound", "1  pre-pass / forward + activation-only backward, time", "pre_pass", "lower_bound", 1.05),
        ("recompute_over_lower_bound", "1  pre-pass with --recompute / the same, time", "recompute", "lower_bound", 1.5),
        ("factored_over_pre_pass", "1  kind factored / pre-pass, time", "factored", "pre_pass", 1.15),
        ("factored_over_lower_bound", "1  kind factored / forward + activation-only backward, time", "factored", "lower_bound", 1.2),
        ("pre_pass_over_batch_gradients", "1  pre-pass / the same with estimator batch, time", "pre_pass", "batch_gradients", 1.0),
    ):  # fmt: skip
        top, bottom = timed["seconds"][way], timed["seconds"][other]
        ratios = ratios_of(top["wall"], bottom["wall"])
        processor = statistics.median(ratios_of(top["processor"], bottom["processor"]))
        seconds = [statistics.median(one["wall"]) for one in (top, bottom)]
        detail = (
            f"{spread(ratios)}; {seconds[0]:.3g} s and {seconds[1]:.3g} s; by processor time {processor:.3f}; "
            f"{len(timed['batches'])} batch(es), the pre-pass's check for randomness included"
        )
        rows.append(Row(name, title, statistics.median(ratios), "x", target, detail))
    return rows


def one_at_a_time_rows(timed: dict[str, Any]) -> list[Row]:
    """Rows 2 and 3: how many times faster the pre-pass is than what is done a sample at a time."""
    count = timed["samples"]
    rows = []
    for name, title, used in (
        ("explicit_masks", "2  explicit masks, one sample at a time / pre-pass, time", count),
        ("full_fisher", "3  full Fisher, data's labels / pre-pass, time", timed["full_fisher_samples"]),
        (
            "exact_full_fisher",
            "3  full Fisher, expectation over labels / pre-pass, time",
            timed["exact_full_fisher_samples"],
        ),
        ("diagonal", "3  full Fisher in batches, data's labels / pre-pass, time", count),
        ("exact_diagonal", "3  full Fisher in batches, expectation over labels / pre-pass, time", count),
    ):
        seconds = [wall * count / used for wall in timed["seconds"][name]["wall"]]
        ratios = ratios_of(seconds, timed["seconds"]["pre_pass"]["wall"])
        how = f"{count} samples" if used == count else f"scaled to {count} samples from {used}"
        labels = f", {timed['labels']} labels" if name.startswith("exact") else ""
        processor = ratios_of(
            [used_up * count / used for used_up in timed["seconds"][name]["processor"]],
            timed["seconds"]["pre_pass"]["processor"],
        )
        detail = (
            f"{spread(ratios)}; {statistics.median(seconds):.3g} s, {how}{labels}; "
            f"by processor time {statistics.median(processor):.2f}"
        )
        rows.append(Row(f"{name}_over_pre_pass", title, statistics.median(ratios), "x", None, detail))
    agreement = Row(
        "disagreement_with_explicit_masks",
        "2  explicit masks and pre-pass, largest difference of the values",
        timed["disagreement"],
        "",
        1e-3,
        f"relative to the largest value of the site; {timed['dtype']} weights",
    )
    return [rows[0], agreement, *rows[1:]]


def memory_rows(runs: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Row 4: peak memory of the pre-pass, of kind factored and of the full diagonal, against that of the lower bound."""
    of = "device memory" if runs["pre_pass"][0]["of"] == "device" else "resident set"
    rows = []
    for way, name, title, without, target in (
        ("pre_pass", "memory", "4  pre-pass / forward + activation-only backward, peak memory", 0, 1.05),
        ("pre_pass", "memory_beyond_model", "4  the same, beyond what the loaded model takes", 1, None),
        ("recompute", "memory", "4  pre-pass with --recompute / the same, peak memory", 0, None),
        ("factored", "memory", "4  kind factored / the same, peak memory", 0, 1.05),
        (
            "factored",
            "memory_beyond_model",
            "4  kind factored / the same, beyond what the loaded model takes",
            1,
            None,
        ),
        ("diagonal", "memory", "4  full Fisher in batches / the same, peak memory", 0, None),
    ):
        # At least a byte: on an idle high-water mark nothing is added.
        used = [
            [max(1, run["peak"] - without * run["before"]) for run in runs[one]]
            for one in (way, "lower_bound")
        ]
        ratios = ratios_of(*used)
        medians = " and ".join(f"{statistics.median(values) / MIB:,.0f}" for values in used)
        rows.append(
            Row(
                f"{way}_{name}_over_lower_bound",
                title,
                statistics.median(ratios),
                "x",
                target,
                f"{spread(ratios)}; {medians} MiB, {of}",
            )
        )
    return rows


def merge_rows(runs: dict[str, dict[str, list[float]]], made: dict[str, Any]) -> list[Row]:
    """Row 5: mergekit-yaml with this package's methods against stock mergekit's linear."""
    count, size, largest = len(made["models"]), made["bytes"], made["largest"]
    on = f"{count} inputs of {size / MIB:,.0f} MiB, on the CPU, linear without the plug-in"
    limit = 1.05 if size >= 1e9 else 1.1  # What starting takes weighs less in a large one.
    rows = []
    for method, name, title, target, unit, scale in (
        ("fisher_mask", "seconds", "5  merge, fisher_mask / linear, time of mergekit-yaml", limit, "s", 1),
        ("fisher_mask", "seconds_once_imported", "5  the same, once everything is imported", None, "s", 1),
        ("fisher_mask", "peak", "5  merge, fisher_mask / linear, peak memory", limit, "MiB", MIB),
        ("nodes_all", "seconds", "5  merge, nodes: all / linear, time of mergekit-yaml", 1.05, "s", 1),
        ("nodes_all", "peak", "5  merge, nodes: all / linear, peak memory", limit, "MiB", MIB),
        (
            "fisher_diagonal",
            "seconds",
            "5  merge, fisher_diagonal / linear, time of mergekit-yaml",
            None,
            "s",
            1,
        ),
        ("fisher_diagonal", "peak", "5  merge, fisher_diagonal / linear, peak memory", None, "MiB", MIB),
    ):
        used = [runs[one][name] for one in (method, "linear")]
        ratios = ratios_of(*used)
        medians = " and ".join(f"{statistics.median(values) / scale:,.4g}" for values in used)
        detail = f"{spread(ratios)}; {medians} {unit}; {on}"
        if name == "seconds":
            processor = ratios_of(*(runs[one]["processor"] for one in (method, "linear")))
            detail += f"; by processor time {statistics.median(processor):.3f}"
        rows.append(
            Row(f"merge_{method}_{name}_over_linear", title, statistics.median(ratios), "x", target, detail)
        )
    beyond = [
        (top - bottom) / (count * largest)
        for top, bottom in zip(runs["fisher_diagonal"]["peak"], runs["linear"]["peak"], strict=False)
    ]
    detail = (
        f"{spread(beyond)}; the largest has {largest / MIB:,.0f} MiB; what is mapped from files is counted"
    )
    title = "5  the same, beyond linear's, in largest tensors of each input"
    rows.append(Row("merge_fisher_diagonal_peak_beyond", title, statistics.median(beyond), "x", 1.0, detail))
    title = "5  sidecar of kind factored / checkpoint, size"
    detail = f"{made['sidecar']:,} and {size:,} bytes"
    rows.append(Row("factored_sidecar_over_checkpoint", title, made["sidecar"] / size, "x", 0.01, detail))
    return rows


def import_rows(runs: dict[str, list[list[float]]]) -> list[Row]:
    """Row 6: what the plug-in adds to `import torch`."""
    on, off = [run[0] for run in runs["on"]], [run[0] for run in runs["off"]]
    search, own = [run[1] for run in runs["off"]], [run[2] for run in runs["off"]]
    medians, fastest = (statistics.median(on), statistics.median(off)), (min(on), min(off))
    return [
        Row(
            "import_torch_milliseconds",
            "6  import torch, longer than with TORCH_DEVICE_BACKEND_AUTOLOAD=0",
            medians[0] - medians[1],
            "ms",
            1.0,
            f"medians of {len(on)}: {medians[0]:,.1f} and {medians[1]:,.1f} ms, "
            f"fastest {fastest[0]:,.1f} and {fastest[1]:,.1f}, slowest {max(on):,.1f} and {max(off):,.1f}",
        ),
        Row(
            "import_torch_search_milliseconds",
            "6  of that, torch's search for plug-ins, which it makes without any too",
            statistics.median(search),
            "ms",
            None,
            f"{spread(search)}, timed by itself",
        ),
        Row(
            "import_torch_plug_in_milliseconds",
            "6  of that, the plug-in: loading and calling its entry point",
            statistics.median(own),
            "ms",
            1.0,
            f"{spread(own)}, timed by itself",
        ),
    ]


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def conditions(timed: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    described = {name: value for name, value in timed.items() if name not in ("seconds", "disagreement")}
    own = {"python": platform.python_version(), "fisher-mask-mergekit": version("fisher-mask-mergekit")}
    return described | {
        "checkpoint": options.checkpoint.name if options.checkpoint else "random, BERT-base's shape",
        "data": options.data.name if options.data else "random text",
        "repeats": options.repeats,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.system(),
        "versions": timed["versions"] | own,
    }


def print_table(rows: Sequence[Row], found: dict[str, Any]) -> None:
    print(f"{'':72}{'measured':>12}{'target':>10}")
    for row in rows:
        value = f"{row.value:.1e}" if 0 < row.value < 0.01 else f"{row.value:.3f}"
        target = "" if row.target is None else f"<= {row.target:g}"
        print(f"{row.title:72}{value + ' ' + row.unit:>12}{target:>10}  {row.verdict}".rstrip())
        print(f"       {row.detail}")
    short = [f"  {row.title}" for row in rows if row.verdict == "FALLS SHORT"]
    print("\nFalls short:", "\n".join(["", *short]) if short else "nothing")
    print("\n" + "\n".join(f"{name}: {value}" for name, value in found.items()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a sequence classifier's folder")
    parser.add_argument("--data", type=Path, help="a .jsonl, .csv or .parquet file")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto", help="for the pre-pass; merges run on the CPU")
    parser.add_argument("--merge-gib", type=float, help="merge random checkpoints of about this size")
    parser.add_argument("--merge-models", type=int, default=2, help="how many are merged, at least 2")
    parser.add_argument("--json", type=Path, help="where to write everything, raw measurements included")
    options = parser.parse_args()
    if options.data and not options.checkpoint:
        parser.error("--data needs a --checkpoint whose labels it has")
    if options.merge_models < 2:
        parser.error("--merge-models must be at least 2")
    return options


def main() -> None:
    options = parse_options()
    how = ["--samples", options.samples, "--device", options.device]
    given = ["--checkpoint", options.checkpoint.resolve()] if options.checkpoint else []
    given += ["--data", options.data.resolve()] if options.data else []
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        work = Path(folder)
        models = ["--models", options.merge_models]
        made = run_script("inputs.py", work, *given, *how, *([] if options.merge_gib else models))
        inputs = [made["models"][0], made["data"], *how]
        timed = run_script("passes.py", "time", *inputs, "--repeats", options.repeats)
        memory = memory_runs(inputs, options.repeats)
        if options.merge_gib:
            work = work / "bigger"
            work.mkdir()
            how = ["--samples", MERGE_SAMPLES, "--device", options.device]
            made = run_script("inputs.py", work, "--gib", options.merge_gib, *how, *models)
        merges = merge_runs(made["models"], work, options.repeats)
    imports = import_runs(IMPORTS if options.repeats > 1 else 1)
    rows = [
        *pre_pass_rows(timed),
        *one_at_a_time_rows(timed),
        *memory_rows(memory),
        *merge_rows(merges, made),
        *import_rows(imports),
    ]
    found = conditions(timed, options)
    print_table(rows, found)
    if options.json:
        table = [asdict(row) | {"verdict": row.verdict} for row in rows]
        raw = {"passes": timed["seconds"], "memory": memory, "merges": merges, "imports": imports}
        report = {"conditions": found, "rows": table, "raw": raw}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
