"""Two and more models: how good a merge still is with each model that joins.

    python benchmarks/many.py RECIPE --work FOLDER --parent FOLDER

merges combinations of the recipe's models in many ways: averaging; ``fisher_mask`` by masks, and by rows and columns of all
parameters, and ``fisher_diagonal``, without and with the models' parent; and mergekit's own methods that need no data, as
their papers recommend them untuned. With ``--add many.json`` of another run, of models that other seeds trained for the same tasks,
its merges count too. Writes ``many.json``, ``many.md`` and ``many.png`` into the work folder.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import summary
from compare import add_runs_option, arguments, bench, compare, groups_of, with_runs, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ways import ALL, AVERAGE, COLUMNS, DIAGONAL, MASK, WITHOUT_DATA, Way, by_tensor, from_parent, normalized

from fisher_mask_mergekit.evaluation.table import aligned

WAYS = (
    AVERAGE,
    normalized(MASK, "model"),
    *map(by_tensor, (COLUMNS, ALL, DIAGONAL)),
    *(from_parent(MASK, prior) for prior in (1, 3)),
    *(from_parent(ALL, prior) for prior in (1, 3)),
    from_parent(DIAGONAL, 1),
    *(
        way for way in WITHOUT_DATA if way.name not in ("model_stock", "karcher")
    ),  # Known to gain nothing here.
)


def pooled(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The merges of all runs, by how many models they are of."""
    counts = sorted({int(count) for run in record["runs"] for count in run["records"]})
    return {
        str(count): [one for run in record["runs"] for one in run["records"].get(str(count), ())]
        for count in counts
    }


def by_run(record: Mapping[str, Any]) -> str:
    """Every way's mean over the pairs of each run that has some."""
    runs = [summary.summaries(run["records"]["2"]) for run in record["runs"] if "2" in run["records"]]
    rows = [["merge", *(f"run {number}" for number in range(1, len(runs) + 1))]]
    for each in zip(*runs, strict=True):
        rows.append([each[0].name, *(f"{one.mean:.1f}" for one in each)])
    return aligned(rows)


def tables(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """By title, a table of the merges of each number of models."""
    made = {}
    for count, merges in found.items():
        groups = f"{len(merges)} combination{'s' * (len(merges) != 1)}"
        made[f"{count} models, {groups}"] = aligned(summary.rows(summary.summaries(merges)))
    return made


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``many.json``."""
    made = tables(pooled(record))
    if len(record["runs"]) > 1:
        made["Mean over the pairs of each run"] = by_run(record)
    return made


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Mean normalised score against the number of models, one line per way."""
    by_count = {count: summary.summaries(found) for count, found in pooled(record).items()}
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colours = {
        "average": "black",
        "masks": "tab:blue",
        "columns": "tab:blue",
        "all": "tab:green",
        "diagonal": "tab:orange",
    }
    markers = cycle("osv^<>DPX*d")
    for place, way in enumerate(WAYS):
        colour = colours.get(re.split("[ ,]", way.name)[0], "grey")
        style = "-" if way.with_parent and way.measured else "--" if way.measured else ":"
        means = [found[place].mean for found in by_count.values()]
        axis.plot(list(by_count), means, style, marker=next(markers), color=colour, label=way.name)
    axis.set_xticks(list(by_count))
    axis.set_xlabel("models in the merge")
    axis.set_ylabel("mean score, % of the fine-tuned models' own")
    axis.grid(color="0.9")
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def options(description: str) -> argparse.ArgumentParser:
    """What a comparison by numbers of models can be told."""
    parser = arguments(description)
    parser.add_argument(
        "--counts",
        default="2,3,4,5,6",
        help="how many models at a time; 3:8 draws eight of the combinations of three [default: %(default)s]",
    )
    add_runs_option(parser)
    return parser


def counted(given: argparse.Namespace, ways: Sequence[Way]) -> dict[str, Any]:
    """Merge as many models at a time as asked for, in every way; what is written down."""
    setting = bench(given)
    records = {}
    for part in given.counts.split(","):
        count, _, most = part.partition(":")
        groups = groups_of(setting.subjects, int(count), int(most) if most else None)
        if groups:
            records[count] = compare(setting, groups, ways)
    return with_runs(given, {**setting.facts(), "records": records})


def main() -> None:
    given = options(__doc__).parse_args()
    record = counted(given, WAYS)
    write(given.work / "many", record, markdown)
    draw(record, given.work / "many.png")


if __name__ == "__main__":
    main()
