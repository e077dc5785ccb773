"""How few samples are enough: every pair of a recipe's checkpoints, merged by measurements on more and more samples.

    python benchmarks/samples.py RECIPE --work FOLDER --parent FOLDER

Each number of samples is drawn several times, by other seeds: how far the merges then differ is what the draw decides. Beside the
labelled samples, some without labels (``labels: sampled``: the model says what they are), and some of random tokens
(``data: random``).
Writes ``samples.json``, ``samples.md`` and ``samples.png`` into the work folder.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import summary
from compare import arguments, bench, compare, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ways import AVERAGE, Way, factored, from_parent, mask

from fisher_mask_mergekit.evaluation.table import aligned

COUNTS = (1, 4, 16, 64, 128, 1024)
SOME = (16, 128)
"""Of those that have no labels."""
SEEDS = (0, 1, 2)
SOURCES: dict[str, dict[str, Any]] = {
    "labelled": {},
    "unlabelled": {"labels": "sampled"},
    "random tokens": {"data": "random", "labels": "sampled"},
}


def schemes(**measured: Any) -> dict[str, Way]:
    """The ways to merge that are compared, by name."""
    return {
        "masks": mask("", {"normalize": "model"}, **measured),
        "all, prior 1": from_parent(factored("", **measured), 1),
    }


def counts_of(source: str) -> tuple[int, ...]:
    """How many samples are drawn from it."""
    return COUNTS if source == "labelled" else SOME


def name_of(scheme: str, source: str, count: int, seed: int) -> str:
    return f"{scheme}; {count} {source}, seed {seed}"


def ways() -> list[Way]:
    """Averaging, and every scheme with every number of samples of every kind and seed."""
    made = [AVERAGE]
    for source, how in SOURCES.items():
        for count in counts_of(source):
            for seed in SEEDS:
                for scheme, way in schemes(**how, samples=count, seed=seed).items():
                    made.append(Way(**vars(way) | {"name": name_of(scheme, source, count, seed)}))
    return made


def points(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, list[summary.Summary]]]]:
    """By scheme, source and number of samples: a summary for each seed."""
    known = {one.name: one for one in summary.summaries(found)}
    return {
        scheme: {
            source: {
                count: [known[name_of(scheme, source, count, seed)] for seed in SEEDS]
                for count in counts_of(source)
            }
            for source in SOURCES
        }
        for scheme in schemes()
    }


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``samples.json``."""
    found = record["records"]
    average = summary.summaries(found)[0]
    tables = {}
    for scheme, sources in points(found).items():
        rows = [
            [
                "samples",
                "of what",
                "mean",
                "least and greatest of the seeds",
                "worst",
                "least gain",
                "above average",
            ]
        ]
        for source, counts in sources.items():
            for count, seeds in counts.items():
                means = [one.mean for one in seeds]
                above = f"{sum(one.above for one in seeds)} of {sum(one.groups for one in seeds)}"
                worst, gain = min(one.worst for one in seeds), min(one.lowest for one in seeds)
                span = f"{min(means):.1f} to {max(means):.1f}"
                rows.append(
                    [f"{count:,}", source, f"{mean(means):.1f}", span, f"{worst:.1f}", f"{gain:+.1f}", above]
                )
        title = (
            f"{scheme}: {len(found)} pairs, {len(SEEDS)} seeds; averaging has a mean of {average.mean:.1f}"
        )
        tables[title] = aligned(rows)
    return tables


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Mean normalised score against the number of samples, one line per source, its span over seeds in colour."""
    found = record["records"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(schemes()), sharey=True)
    for axis, (scheme, sources) in zip(axes, points(found).items(), strict=True):
        for source, counts in sources.items():
            means = [[one.mean for one in seeds] for seeds in counts.values()]
            (line,) = axis.plot(list(counts), list(map(mean, means)), "o-", label=source)
            spans = list(map(min, means)), list(map(max, means))
            axis.fill_between(list(counts), *spans, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.axhline(summary.summaries(found)[0].mean, color="black", linestyle=":", label="average")
        axis.set_xscale("log", base=2)
        axis.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
        axis.set_title(scheme)
        axis.set_xlabel("samples of each model")
        axis.grid(color="0.9")
    axes[0].set_ylabel("mean score, % of the fine-tuned models' own")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    given = arguments(__doc__).parse_args()
    setting = bench(given)
    found = compare(setting, list(combinations(setting.subjects, 2)), ways())
    record = {**setting.facts(), "records": found}
    write(given.work / "samples", record, markdown)
    draw(record, given.work / "samples.png")


if __name__ == "__main__":
    main()
