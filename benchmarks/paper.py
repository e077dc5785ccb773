"""The tables of arXiv 2403.09891, made again: every pair of a recipe's checkpoints, merged in the paper's ways.

    python benchmarks/paper.py recipes/paper/bert-base.yml --work FOLDER --pooler average

Table 1: the median over all pairs' tasks of the accuracy normalised by each fine-tuned model's own. Table 2: each pair.
Table 3: seconds to measure a checkpoint on 128 samples, median of 3, mean over the checkpoints. Table 4: the same in
GFLOPs, as torch counts them. Published
figures stand beside those measured where the recipe is one of the paper's; they were measured on a T4 GPU, with the released
code. Writes ``paper.json`` and ``paper.md`` into the work folder.

Full Fisher information is the exact expectation over the labels, as in the paper, for up to eight labels; with more, one
label is drawn from the model for each sample.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import summary
from compare import Bench, arguments, bench, compare, sidecar_name, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from ways import AVERAGE, Way, diagonal, mask

from fisher_mask_mergekit.evaluation.plan import Subject
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute

BATCH = 32
REPEATS = 3
COSTED = 128
"""Samples that times and FLOPs are for, as in the paper."""
WAYS: Mapping[str, Callable[[int], Way]] = {
    "full Fisher": lambda samples: diagonal(f"full Fisher, {samples:,}", samples=samples, labels="exact"),
    "mask Fisher": lambda samples: mask(f"mask Fisher, {samples:,}", samples=samples),
    "mask Fisher, released code": lambda samples: mask(
        f"mask Fisher, released code, {samples:,}",
        {"unmasked": "universal"},
        samples=samples,
        estimator="batch",
        batch_size=BATCH,
    ),
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "bert-base": {
        "average": 91.2,
        "full Fisher": (92.0, 91.7, 91.9),
        "mask Fisher, released code": (95.2, 92.8, 93.7),
        "seconds": (58.009, 0.959),
        "gflops": 4172.0,
    },
    "bert-large": {
        "average": 85.8,
        "full Fisher": (87.0, 86.1, 89.2),
        "mask Fisher, released code": (90.1, 88.1, 87.9),
        "seconds": (214.299, 4.003),
        "gflops": 14693.0,
    },
    "bert-tiny": {
        "average": 90.8,
        "full Fisher": (89.6, 89.2, 90.4),
        "mask Fisher, released code": (86.1, 88.4, 88.7),
        "seconds": (17.101, 0.055),
        "gflops": 18.64,
    },
    "roberta-base": {
        "average": 86.2,
        "full Fisher": (91.5, 88.5, 88.5),
        "mask Fisher, released code": (92.7, 89.4, 88.8),
        "seconds": (59.383, 0.993),
        "gflops": 4139.0,
    },
}
"""Tables 1, 3 and 4 of the paper; with 128, 2,048 and 32,768 samples; seconds of full and mask Fisher."""
PUBLISHED_SAMPLES = (128, 2048, 32768)


def ways_of(samples: Sequence[int]) -> list[Way]:
    return [AVERAGE, *(make(count) for make in WAYS.values() for count in samples)]


def published(stem: str, name: str) -> str:
    """What the paper has for a way to merge, if it has."""
    figures = PUBLISHED.get(stem, {})
    kind, _, samples = name.rpartition(", ")
    if name == AVERAGE.name:
        return str(figures.get(name, ""))
    by_samples = dict(zip(PUBLISHED_SAMPLES, figures.get(kind, ()), strict=False))
    return str(by_samples.get(int(samples.replace(",", "")), ""))


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``paper.json``."""
    found, stem = record["records"], record["recipe"]
    tables = {
        f"Table 1, {len(found)} pairs": scores_table(stem, summary.summaries(found)),
        "Table 2": pairs_table(found),
    }
    if record["costs"]:
        models = len(record["checkpoints"])
        title = f"Tables 3 and 4, {COSTED} samples, mean over {models} checkpoints"
        tables[title] = costs_table(stem, record["costs"])
    return tables


def scores_table(stem: str, found: Sequence[summary.Summary]) -> str:
    head, *table = summary.rows(found)
    rows = [[*head[:2], "published", *head[2:]]]
    rows += [[*row[:2], published(stem, one.name), *row[2:]] for row, one in zip(table, found, strict=True)]
    return aligned(rows)


def pairs_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Both tasks' normalised scores, pair by pair."""
    names = found[0]["results"]["merges"]
    rows = [["pair", *names]]
    for one in found:
        tasks = one["results"]["tasks"]
        cells = [" / ".join(_text(task["normalised"][name]["value"]) for task in tasks) for name in names]
        rows.append([" + ".join(one["models"]), *cells])
    return aligned(rows)


def _text(score: float | None) -> str:
    return "n/a" if score is None else f"{score:.1f}"


def cost(setting: Bench, subject: Subject, way: Way) -> dict[str, Any]:
    """Seconds and GFLOPs of measuring a checkpoint, forward and backward."""
    settings = way.settings(subject.model.request, subject.config.num_labels)

    def run(folder: Path) -> float:
        out = folder / sidecar_name("sidecar", settings)
        return compute(prepare(subject.model.name, settings, out=out), setting.device).seconds

    seconds = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(run(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        flops = count_flops(lambda: run(Path(folder)))
    return {"seconds": seconds, "gflops": sum(flops.values()) / 1e9}


def count_flops(run: Callable[[], object]) -> dict[str, int]:
    """By operation, what torch's counter has a formula for; fused attention on a CPU is not among it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def costs(setting: Bench, ways: Sequence[Way]) -> dict[str, dict[str, Any]]:
    """By way and checkpoint; the ways in turn, so that they are measured side by side."""
    found: dict[str, dict[str, Any]] = {way.name: {} for way in ways}
    if ways:
        cost(setting, setting.subjects[0], ways[-1])  # Else the first one pays for what is set up once.
    for subject in setting.subjects:
        for way in ways:
            found[way.name][subject.name] = cost(setting, subject, way)
    return found


def costs_table(stem: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    figures = PUBLISHED.get(stem, {})
    seconds = dict(
        zip(("full Fisher", "mask Fisher, released code"), figures.get("seconds", ()), strict=False)
    )
    rows = [["measured", "seconds", "published", "GFLOPs", "published"]]
    for name, models in found.items():
        kind = name.rpartition(", ")[0]
        each = [(statistics.median(one["seconds"]), one["gflops"]) for one in models.values()]
        seconds_each, gflops_each = (sum(part) / len(each) for part in zip(*each, strict=True))
        gflops = str(figures.get("gflops", "")) if kind == "mask Fisher, released code" else ""
        rows.append([name, f"{seconds_each:.3g}", str(seconds.get(kind, "")), f"{gflops_each:,.4g}", gflops])
    return aligned(rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--samples", default="128,2048,32768", help="with commas between [default: %(default)s]"
    )
    parser.add_argument("--no-costs", action="store_true", help="leave out times and FLOPs")
    given = parser.parse_args()
    setting = bench(given)
    ways = ways_of([int(count) for count in given.samples.split(",")])
    found = compare(setting, list(combinations(setting.subjects, 2)), ways)
    if not given.no_costs:
        print(
            f"measuring times and FLOPs of {COSTED} samples, {REPEATS} times (--no-costs leaves them out)",
            flush=True,
        )
    costed = [] if given.no_costs else [make(COSTED) for make in WAYS.values()]
    record = {
        "recipe": given.recipe.stem,
        **setting.facts(),
        "records": found,
        "costs": costs(setting, costed),
    }
    write(given.work / "paper", record, markdown)


if __name__ == "__main__":
    main()
