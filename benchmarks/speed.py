"""How fast and how lean the pre-pass, the merge and what starts are, against what they could be.

    python benchmarks/speed.py [--only PARTS] [--shapes tiny,base,large] [--samples 128] [--repeats 5] [--device auto]
                               [--checkpoint FOLDER] [--data FILE] [--merge-gib 1] [--merge-models 2,4,8] [--json OUT]

Prints ratios beside their targets, and writes them as JSON. The parts: ``pre-pass``, on a random classifier of each
BERT shape and random text, or on a checkpoint and data of yours; ``merge``, of random bfloat16 checkpoints in shards;
``start``, of processes; ``growth``, the exponents of the first points of growth.py's curves. Everything is measured in processes of their own. Needs a POSIX system, and room for all
checkpoints and two that are as large; TMPDIR says where, OMP_NUM_THREADS how many threads.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import environment, file_name, hardware, heading
from growth import exponents, pre_pass_curve
from processes import help_runs, import_runs, memory_runs, merge_runs, run_script
from ratios import MIB, Row, from_record, full_fisher_rows, memory_rows, merge_rows, pre_pass_rows, start_rows

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
"""BERT's, as the paper has them: what of BERT-base's configuration is otherwise."""

PROCESSES = 20
"""Of those that are timed as a whole."""

MERGE_SAMPLES = 2
"""Samples that the sidecars of merges are measured on: no merge's cost depends on their number."""

POINTS = 3
"""Of the curves that are a part of this."""

MOST_MERGES = 3
"""Merges are repeated this often at most."""

Tables = Iterator[dict[str, Any]]


def pre_pass_tables(options: argparse.Namespace, work: Path) -> Tables:
    """One for each shape, or for the checkpoint that is given."""
    for shape in [""] if options.checkpoint else options.shapes:
        folder = work / f"pre-pass-{shape}"
        folder.mkdir()
        how = ["--samples", options.samples, "--device", options.device]
        made = run_script("inputs.py", folder, *given(options, shape), *how)
        inputs = [made["models"][0], made["data"], *how]
        timed = run_script("passes.py", "time", *inputs, "--repeats", options.repeats)
        memory = memory_runs(inputs, min(options.repeats, MOST_MERGES))
        rows = [*pre_pass_rows(timed), *memory_rows(memory), *full_fisher_rows(timed, shape)]
        conditions = {name: value for name, value in timed.items() if name not in ("seconds", "disagreement")}
        yield {
            "part": "Pre-pass",
            "case": f"BERT-{shape}, {options.samples} samples" if shape else options.checkpoint.name,
            "device": timed["device"],
            "conditions": conditions | {"data": options.data.name if options.data else "random text"},
            "rows": [row.record() for row in rows],
            "raw": {"passes": timed["seconds"], "memory": memory},
        }


def given(options: argparse.Namespace, shape: str) -> list[object]:
    """What ``inputs.py`` is to make a checkpoint of."""
    found: list[object] = ["--checkpoint", options.checkpoint.resolve()] if options.checkpoint else []
    found += ["--data", options.data.resolve()] if options.data else []
    return found or ["--config", json.dumps(SHAPES[shape])]


def merge_tables(options: argparse.Namespace, work: Path) -> Tables:
    """One for each number of models; what goes by every parameter, by sidecars twice the models or by small ones, for the fewest."""
    counts = sorted(options.merge_models)
    of = ["--gib", options.merge_gib] if options.merge_gib else given(options, "base")
    folder = work / "merge"
    folder.mkdir()
    sidecars = ["--mask", counts[-1], "--samples", MERGE_SAMPLES]
    sidecars += ["--factored", counts[0], "--diagonal", counts[0]]
    made = run_script("inputs.py", folder, *of, "--models", counts[-1], *sidecars, "--device", options.device)
    for count in counts:
        methods = ["fisher_mask", *(["nodes_all", "fisher_diagonal"] if count == counts[0] else [])]
        repeats = min(options.repeats, MOST_MERGES)
        # Not worth its time where one run is all there is, or what is merged was merged before.
        warm = repeats == 1 or count > counts[0]
        runs = merge_runs(made["models"][:count], folder, repeats, methods, warm=warm)
        rows = merge_rows(runs, count, made["bytes"], made["largest"], made["factored_sidecar"])
        yield {
            "part": "Merge",
            "case": f"{count} x {made['bytes'] / MIB:,.0f} MiB",
            "device": "cpu",
            "conditions": {"models": count, "bytes": made["bytes"], "largest_tensor": made["largest"]},
            "rows": [row.record() for row in rows],
            "raw": runs,
        }


def start_tables(options: argparse.Namespace, work: Path) -> Tables:
    """What starts."""
    count = PROCESSES if options.repeats > 1 else 1
    imports, command = import_runs(count), help_runs(count)
    yield {
        "part": "Start",
        "case": f"{count} processes",
        "device": "cpu",
        "conditions": {},
        "rows": [row.record() for row in start_rows(imports, command)],
        "raw": {"imports": imports, "help": command},
    }


def growth_tables(options: argparse.Namespace, work: Path) -> Tables:
    """Whether time and memory grow no faster than they must, as far as a few small points tell."""
    curves = {
        name: pre_pass_curve(name, POINTS, options.device) for name in ("samples", "layers, --recompute")
    }
    rows = [
        Row(file_name(name, what), f"{name}: exponent of {what}", [value], "fitted", unit="", target=aim)
        for name, what, value, aim in exponents(curves)
        if aim is not None
    ]
    yield {
        "part": "Growth",
        "case": f"{POINTS} points of each curve",
        "device": curves["samples"][0]["device"],
        "conditions": {},
        "rows": [row.record() for row in rows],
        "raw": curves,
    }


PARTS: Mapping[str, Callable[[argparse.Namespace, Path], Tables]] = {
    "pre-pass": pre_pass_tables,
    "merge": merge_tables,
    "start": start_tables,
    "growth": growth_tables,
}


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """For each part, a table of its ratios, one column per case, titled with what they were measured on."""
    from fisher_mask_mergekit.evaluation.table import aligned  # Heavier than what measures may be.

    parts: dict[str, list[Mapping[str, Any]]] = {}
    for table in record["tables"]:
        parts.setdefault(heading(table["part"], record["environment"], table["device"]), []).append(table)
    return {title: aligned(_cells(tables)) for title, tables in parts.items()}


def _cells(tables: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = [{row.title: row for row in map(from_record, table["rows"])} for table in tables]
    lines = [["", "target", *(table["case"] for table in tables)]]
    for title in dict.fromkeys(title for column in columns for title in column):
        found = [column.get(title) for column in columns]
        aim = next((row.aim for row in found if row is not None and row.aim), "")
        lines.append([title, aim, *("" if row is None else _cell(row) for row in found)])
    return lines


def _cell(row: Row) -> str:
    return f"{row.shown}: {row.verdict}" if row.verdict == "falls short" else row.shown


def print_table(table: Mapping[str, Any]) -> None:
    print(f"\n{table['part']}, {table['case']}, on {table['device']}", flush=True)
    for row in map(from_record, table["rows"]):
        print(f"  {row.title:72}{row.shown:>26}{row.aim:>10}  {row.verdict}".rstrip())
        print(f"      {row.detail}")


def short_of(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not as it should be."""
    return [
        f"{table['case']}: {row['title']}"
        for table in tables
        for row in table["rows"]
        if row["verdict"] == "falls short"
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=several, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shapes", type=several, default=["tiny", "base"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--checkpoint", type=Path, help="a sequence classifier's folder, in place of the shapes"
    )
    parser.add_argument("--data", type=Path, help="a .jsonl, .csv or .parquet file")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto", help="for the pre-pass; merges run on the CPU")
    parser.add_argument(
        "--merge-gib", type=float, default=1.0, help="of each; 0 for copies of the checkpoint"
    )
    parser.add_argument("--merge-models", type=counts, default=[2, 4, 8], help="how many, each at least 2")
    parser.add_argument("--json", type=Path, help="where to write everything, raw measurements included")
    options = parser.parse_args(arguments)
    for chosen, known in ((options.only, PARTS), (options.shapes, SHAPES)):
        if unknown := [one for one in chosen if one not in known]:
            parser.error(f"{unknown[0]} is none of {', '.join(known)}")
    if options.data and not options.checkpoint:
        parser.error("--data needs a --checkpoint whose labels it has")
    if min(options.merge_models) < 2:
        parser.error("--merge-models must be at least 2")
    return options


def several(text: str) -> list[str]:
    """What has commas between."""
    return text.split(",")


def counts(text: str) -> list[int]:
    """Numbers with commas between."""
    return [int(part) for part in several(text)]


def destination(options: argparse.Namespace, found: Mapping[str, Any], device: str) -> Path:
    """Where a run is written if nobody says: a file for each machine and choice of parts."""
    chosen = [*options.only, *options.shapes] if options.only != list(PARTS) else options.shapes
    return RESULTS / f"speed-{file_name(hardware(found, device), *chosen)}.json"


def main() -> None:
    options = parse_options()
    record: dict[str, Any] = {"environment": environment(), "tables": []}
    device, out = "cpu", options.json
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        for part in options.only:
            for table in PARTS[part](options, Path(folder)):
                print_table(table)
                record["tables"].append(table)
                device = table["device"] if device == "cpu" else device
                out = options.json or destination(options, record["environment"], device)
                out.write_text(json.dumps(record, indent=1) + "\n")  # It stays, if the rest is broken off.
    short = [f"  {line}" for line in short_of(record["tables"])]
    print("\nFalls short:", "\n".join(["", *short]) if short else "nothing")
    print(f"\nWritten to {out}; python -m tests.test_figures puts what is in {RESULTS} into the pages")


if __name__ == "__main__":
    main()
