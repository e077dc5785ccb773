"""Two and more models: how good a merge still is with each model that joins.

    python benchmarks/many.py RECIPE --work FOLDER --parent FOLDER

merges every combination of the recipe's models in many ways: averaging, ``fisher_mask`` and ``fisher_diagonal`` with each
``normalize``, and mergekit's own methods that need no data, as their papers recommend them untuned. Writes ``many.json``,
``many.md`` and ``many.png`` into the work folder.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import summary
from compare import arguments, bench, compare, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ways import AVERAGE, WITHOUT_DATA, diagonal, mask

from fisher_mask_mergekit.evaluation.table import aligned

WAYS = (
    AVERAGE,
    *(mask(f"fisher_mask {kind}", {"normalize": kind}) for kind in ("none", "model", "layer")),
    *(diagonal(f"fisher_diagonal {kind}", {"normalize": kind}) for kind in ("none", "model")),
    *WITHOUT_DATA,
)


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``many.json``."""
    tables = {}
    for count, found in record["records"].items():
        groups = f"{len(found)} combination{'s' * (len(found) != 1)}"
        tables[f"{count} models, {groups}"] = aligned(summary.rows(summary.summaries(found)))
    return tables


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Mean normalised score against the number of models, one line per way."""
    by_count = {count: summary.summaries(found) for count, found in record["records"].items()}
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    styles = {
        "average": ("black", "-"),
        "fisher_mask": ("tab:blue", "-"),
        "fisher_diagonal": ("tab:orange", "-"),
    }
    markers = iter("osv^<>DPX*d")
    for place, way in enumerate(WAYS):
        colour, style = styles.get(way.name.split()[0], ("grey", "--"))
        means = [found[place].mean for found in by_count.values()]
        axis.plot(list(by_count), means, style, marker=next(markers), color=colour, label=way.name)
    axis.set_xticks(list(by_count))
    axis.set_xlabel("models in the merge")
    axis.set_ylabel("mean score, % of the fine-tuned models' own")
    axis.grid(color="0.9")
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--counts", default="2,3,4,5,6", help="how many models at a time [default: %(default)s]"
    )
    given = parser.parse_args()
    setting = bench(given)
    records = {}
    for count in given.counts.split(","):
        groups = list(combinations(setting.subjects, int(count)))
        if groups:
            records[count] = compare(setting, groups, WAYS)
    record = {**setting.facts(), "records": records}
    write(given.work / "many", record, markdown)
    draw(record, given.work / "many.png")


if __name__ == "__main__":
    main()
