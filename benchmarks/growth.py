"""How time and memory grow: of the pre-pass with samples, tokens, layers, width and heads; of a merge with models and layers.

    python benchmarks/growth.py [--only CURVES] [--points 5] [--device auto] [--json OUT] [--picture OUT]

Random models are made on the spot. Every point is measured in processes of its own, one for time and one for memory, without
what the model takes. Prints tables with fitted exponents (a in ``y ~ x^a``), and writes JSON and a picture.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import environment, file_name, hardware, heading
from processes import COMMAND, RETURNED, merge_runs, run_python, run_script

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "growth.png"
MIB = 2**20
REPEATS = 3
SMALL = {"samples": 32, "length": 64, "layers": 2, "hidden": 128, "heads": 2}
"""A BERT whose samples are one batch."""

CURVES: Mapping[str, tuple[str, Sequence[Mapping[str, int]]]] = {
    "samples": ("samples", [SMALL | {"samples": n, "length": 32} for n in (128, 512, 2048, 8192, 32768)]),
    "tokens": ("length", [SMALL | {"samples": 8, "length": n} for n in (32, 128, 512, 2048, 4096)]),
    "layers": ("layers", [SMALL | {"layers": n} for n in (2, 4, 8, 16, 32)]),
    "layers, --recompute": ("layers", [SMALL | {"layers": n, "recompute": 1} for n in (2, 4, 8, 16, 32)]),
    "width": ("hidden", [SMALL | {"hidden": n, "heads": n // 64} for n in (64, 128, 256, 512, 1024)]),
    "heads": ("heads", [SMALL | {"layers": 4, "hidden": 256, "heads": n} for n in (1, 2, 4, 8, 16)]),
}
"""By name: which number grows, and the points. Width grows with heads of 64."""

MERGED: Mapping[str, Sequence[tuple[int, Mapping[str, int]]]] = {
    "models merged": [(n, {"num_hidden_layers": 4, "hidden_size": 512}) for n in (2, 4, 8)],
    "layers merged": [(2, {"num_hidden_layers": n, "hidden_size": 64}) for n in (4, 8, 16, 32)],
}
"""By name: models, and what their configuration is, at each point."""

COMPUTED = "samples, whole command"
"""The curve of ``mergekit-fisher compute`` from a file, all that starts and reads included."""

FLAT, LINEAR = 0.05, 1.05
AIMS = {
    ("samples", "time"): LINEAR,
    ("samples", "memory"): FLAT,
    ("tokens", "time by FLOPs"): LINEAR,
    ("layers", "time by FLOPs"): LINEAR,
    ("layers, --recompute", "time by FLOPs"): LINEAR,
    ("layers, --recompute", "memory"): FLAT,
    ("width", "time by FLOPs"): LINEAR,
    ("heads", "memory"): FLAT,
    (COMPUTED, "time"): LINEAR,
    (COMPUTED, "memory"): FLAT,
}
"""The most that an exponent should be."""


def pre_pass_curve(name: str, most: int, device: str) -> list[dict[str, Any]]:
    """The points of one of :data:`CURVES`, the smallest first."""
    grows, points = CURVES[name]
    found = []
    for point in points[:most]:
        how = json.dumps({**point, "recompute": bool(point.get("recompute")), "device": device})
        timed = run_script("growth_point.py", "time", how, str(REPEATS))
        weighed = run_script("growth_point.py", "memory", how, "1", **RETURNED)
        found.append({"x": point[grows], **timed, "memory": max(1, weighed["peak"])})
    return found


def merge_curve(name: str, most: int, work: Path) -> list[dict[str, Any]]:
    """The points of one of :data:`MERGED`: ``fisher_mask`` and, beside it, ``linear``."""
    found = []
    for number, (models, config) in enumerate(MERGED[name][:most]):
        folder = work / f"{file_name(name)}-{number}"
        folder.mkdir()
        config = {**config, "num_attention_heads": 4, "intermediate_size": 4 * config["hidden_size"]}
        how = ["--config", json.dumps(config | {"vocab_size": 1000}), "--samples", 2]
        made = run_script("inputs.py", folder, *how, "--models", models, "--mask", models)
        runs = merge_runs(made["models"], folder, REPEATS, ["fisher_mask"], warm=number > 0)
        x = models if name.startswith("models") else config["num_hidden_layers"]
        own, linear = runs["fisher_mask"], runs["linear"]
        found.append(
            {
                "x": x,
                "wall": own["seconds_once_imported"],
                "processor": own["processor"],
                "memory": statistics.median(own["peak"]),
                "linear_wall": linear["seconds_once_imported"],
                "linear_memory": statistics.median(linear["peak"]),
            }
        )
    return found


def command_curve(most: int, device: str, work: Path) -> list[dict[str, Any]]:
    """``mergekit-fisher compute`` from a file of as many texts as the point has samples, by processes as a whole."""
    counts = [point["samples"] for point in CURVES["samples"][1]][:most]
    config = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    made = run_script(
        "inputs.py", work, "--config", json.dumps(config | {"vocab_size": 1000}), "--samples", counts[-1]
    )
    found = []
    for count in counts:
        asked = ["compute", made["models"][0], "--data", made["data"], "--samples", str(count), "--force"]
        device_option = [] if device == "auto" else ["--device", device]
        done = run_python(["-P", "-c", COMMAND, *asked, *device_option])
        found.append({"x": count, "wall": [done.seconds], "processor": [done.processor], "memory": done.peak})
    return found


def exponent(points: Sequence[Mapping[str, Any]], of: str, by: str = "x") -> float:
    """The slope of a straight line through the logarithms."""
    from numpy import log, polyfit

    xs, ys = ([_number(point, name) for point in points] for name in (by, of))
    return float(polyfit(log(xs), log(ys), 1)[0]) if len(points) > 1 else math.nan


def _number(point: Mapping[str, Any], name: str) -> float:
    value = point[name]
    return statistics.median(value) if isinstance(value, list) else value


def exponents(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[tuple[str, str, float, float | None]]:
    """Of every curve and what grows in it: the fitted exponent, and the most that it should be.

    A merge's time may grow as ``linear``'s does, which reads and writes the same.
    """
    found = []
    for name, points in curves.items():
        fits = {"time": exponent(points, "wall"), "memory": exponent(points, "memory")}
        if "flops" in points[0] and name != "heads":  # Those are as many, however many heads.
            fits["time by FLOPs"] = exponent(points, "wall", "flops")
        aims = {what: AIMS.get((name, what)) for what in fits}
        if "linear_wall" in points[0]:
            fits["linear's time"] = exponent(points, "linear_wall")
            aims["time"] = max(LINEAR, fits["linear's time"])
        found += [(name, what, value, aims.get(what)) for what, value in fits.items()]
    return found


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The exponents, then every curve."""
    from fisher_mask_mergekit.evaluation.table import aligned  # Heavier than what measures may be.

    rows = [["grows with", "what", "exponent", "at most"]]
    for name, what, value, aim in exponents(record["curves"]):
        short = ": falls short" if aim is not None and not value <= aim else ""
        rows.append([name, what, f"{value:.2f}{short}", "" if aim is None else f"{aim:.3g}"])
    tables = {heading("Exponents", record["environment"], record["device"]): aligned(rows)}
    ran_on = hardware(record["environment"], record["device"])
    for name, points in record["curves"].items():
        tables[f"By {name} ({ran_on})"] = aligned([_head(points[0]), *(_cells(point) for point in points)])
    return tables


def _head(point: Mapping[str, Any]) -> list[str]:
    head = ["", "seconds", "processor seconds", "peak MiB"]
    head += ["GFLOP", "GFLOP per second"] if "flops" in point else []
    return head + (["linear, seconds", "linear, peak MiB"] if "linear_wall" in point else [])


def _cells(point: Mapping[str, Any]) -> list[str]:
    wall = _number(point, "wall")
    cells = [
        f"{point['x']:,}",
        f"{wall:.3g}",
        f"{_number(point, 'processor'):.3g}",
        f"{point['memory'] / MIB:,.1f}",
    ]
    if "flops" in point:
        cells += [f"{point['flops'] / 1e9:,.3g}", f"{point['flops'] / 1e9 / wall:,.1f}"]
    if "linear_wall" in point:
        cells += [f"{_number(point, 'linear_wall'):.3g}", f"{point['linear_memory'] / MIB:,.1f}"]
    return cells


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Seconds and peak memory of every curve, each from its first point on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    markers = "osv^<>DPX*"
    for axis, (of, title) in zip(
        figure.subplots(1, 2), (("wall", "time"), ("memory", "peak memory")), strict=True
    ):
        for place, (name, points) in enumerate(record["curves"].items()):
            first = points[0]
            xs = [point["x"] / first["x"] for point in points]
            ys = [_number(point, of) / _number(first, of) for point in points]
            axis.loglog(xs, ys, marker=markers[place % len(markers)], label=name, base=2)
        ends = [1, 256]
        axis.plot(ends, ends, "--", color="grey", label="linear")
        axis.plot(ends, [1, 1], ":", color="grey", label="flat")
        axis.set_xlabel("times the first point")
        axis.set_ylabel(f"{title}, times the first point's")
        axis.set_ylim(0.5, 600)
        axis.grid(color="0.9")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=150, facecolor="white")


def parse_options() -> argparse.Namespace:
    known = [*CURVES, COMPUTED, *MERGED]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"curves with semicolons between, of: {'; '.join(known)}")
    parser.add_argument("--points", type=int, default=5, help="of each curve at most, the smallest first")
    parser.add_argument("--device", default="auto", help="for the pre-pass; merges run on the CPU")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--picture", type=Path, help=f"where to draw the curves, as {PICTURE.name}")
    options = parser.parse_args()
    options.only = options.only.split(";") if options.only else known
    if unknown := [name for name in options.only if name not in known]:
        parser.error(f"{unknown[0]} is none of {'; '.join(known)}")
    return options


def measured(name: str, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """The points of any curve."""
    if name in CURVES:
        return pre_pass_curve(name, options.points, options.device)
    if name in MERGED:
        return merge_curve(name, options.points, work)
    return command_curve(options.points, options.device, work)


def main() -> None:
    options = parse_options()
    record: dict[str, Any] = {"environment": environment(), "device": "cpu", "curves": {}}
    out = options.json
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        for name in options.only:
            points = record["curves"][name] = measured(name, options, Path(folder))
            record["device"] = points[0].get("device", record["device"])
            place = file_name(hardware(record["environment"], record["device"]))
            out = options.json or RESULTS / f"growth-{place}.json"
            out.write_text(
                json.dumps(record, indent=1) + "\n"
            )  # What is measured stays, if the rest is broken off.
            print(f"{name}: {len(points)} points", flush=True)
    print("\n\n".join(f"{title}:\n\n{table}" for title, table in markdown(record).items()))
    if options.picture:
        draw(record, options.picture)
    print(f"\nWritten to {out}; python -m tests.test_figures puts what is in {RESULTS} into the pages")


if __name__ == "__main__":
    main()
