"""Which setting is best: every pair of a recipe's checkpoints, merged with each setting of ``fisher_mask``.

    python benchmarks/choices.py RECIPE --work FOLDER --short RECIPE
    python benchmarks/choices.py RECIPE --work FOLDER --short RECIPE --nodes all --parent FOLDER

One setting at a time departs from the default (128 samples, ``estimator: sample``, ``mask_placement: post``, ``labels: data``,
``unmasked: average``, seed 0), each with ``normalize: none`` and ``normalize: model``. Then what should not decide a merge, but
may: one model of a pair measured on 16 samples, the other on 512; and a model that was trained for a short while (those of
``--short``), so that its loss and its Fisher information are large, beside one trained to the end. With ``--nodes all`` the same
for columns, and for rows and columns: each with every ``normalize``, and from the models' parent; there the settings are those
that depart from ``normalize: tensor`` and ``prior: 1``. Writes ``choices.json`` and ``choices.md``, or ``choices-all.json`` and
``choices-all.md``, into the work folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import summary
from compare import arguments, bench, compare, with_settings, write
from ways import ALL, AVERAGE, COLUMNS, MASK, MOST_EXACT, Way, from_parent, mask, normalized

from fisher_mask_mergekit.evaluation.plan import Subject
from fisher_mask_mergekit.evaluation.table import aligned

NORMALIZE = ("none", "model", "layer")
FEW, MANY = 16, 512
PLAIN = (AVERAGE, *(mask(f"normalize {kind}", {"normalize": kind}) for kind in NORMALIZE))
CHANGED: dict[str, dict[str, Any]] = {
    "mask_placement pre": {"mask_placement": "pre"},
    "estimator batch": {"estimator": "batch"},
    "labels sampled": {"labels": "sampled"},
    f"labels exact (sampled beyond {MOST_EXACT})": {"labels": "exact"},
    f"samples {FEW}": {"samples": FEW},
    f"samples {MANY}": {"samples": MANY},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
}
CROSSED = ("mask_placement pre", "estimator batch")
"""What is tried between unequal models too, beside ``normalize`` and ``unmasked``."""
UNMASKED = ("layer", "universal")

BALANCE = ("none", "model", "tensor")
FROM_PARENT = from_parent(ALL, 1)
BALANCED = (
    AVERAGE,
    *(normalized(way, kind) for way in (COLUMNS, ALL) for kind in BALANCE),
    from_parent(MASK, 1),
    from_parent(COLUMNS, 1),
    FROM_PARENT,
    normalized(FROM_PARENT, "model"),
)
PRIORS = (0.3, 3, 10)
CHANGED_ALL = {"estimator token": {"estimator": "token"}} | {
    name: how for name, how in CHANGED.items() if name not in CROSSED
}


def ways_of(nodes: str) -> tuple[Sequence[Way], Sequence[Way]]:
    """What is tried between models that are alike, and what between models that are not."""
    if nodes == "paper":
        return by_masks(CHANGED), by_masks({name: CHANGED[name] for name in CROSSED})
    changed = [
        replace(FROM_PARENT, name=f"{FROM_PARENT.name}, {name}", measured={"kind": "factored", **how})
        for name, how in CHANGED_ALL.items()
    ]
    return [*BALANCED, *(from_parent(ALL, prior) for prior in PRIORS), *changed], BALANCED


def by_masks(changed: Mapping[str, dict[str, Any]]) -> list[Way]:
    """The default, and everything that departs from it in one setting."""
    ways = list(PLAIN)
    for kind in NORMALIZE[:2]:
        ways += [
            mask(f"{name}, normalize {kind}", {"normalize": kind}, **how) for name, how in changed.items()
        ]
        ways += [
            mask(f"unmasked {name}, normalize {kind}", {"normalize": kind, "unmasked": name})
            for name in UNMASKED
        ]
    return ways


def unequal_samples(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """Every pair twice: first the one, then the other measured on few samples."""
    return [
        (with_settings(few, samples=FEW), with_settings(many, samples=MANY))
        for few, many in permutations(subjects, 2)
    ]


def unequal_losses(short: Sequence[Subject], whole: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """Every model trained for a short while with every one trained to the end on another task."""
    return [(one, other) for one in short for other in whole if one.settings.data != other.settings.data]


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``choices.json``."""
    return {
        f"{title}, {len(found)} merges": aligned(summary.rows(summary.summaries(found)))
        for title, found in record["records"].items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--short", type=Path, help="a recipe of models trained for a short while")
    parser.add_argument(
        "--nodes",
        choices=("paper", "all"),
        default="paper",
        help="what merges go by: masks; or columns, and rows and columns (needs --parent) [default: %(default)s]",
    )
    given = parser.parse_args()
    setting = bench(given)
    whole = setting.subjects
    alike, unlike = ways_of(given.nodes)
    name, start = ("choices", "") if given.nodes == "paper" else ("choices-all", "Rows and columns: ")
    sections = {
        f"{start}One setting at a time": compare(setting, list(combinations(whole, 2)), alike),
        f"{start}One model measured on {FEW} samples, the other on {MANY}": compare(
            setting, unequal_samples(whole), unlike
        ),
    }
    if given.short:
        short = bench(argparse.Namespace(**vars(given) | {"recipe": given.short, "models": None})).subjects
        pairs = unequal_losses(short, whole)
        sections[f"{start}One model trained for a short while"] = compare(setting, pairs, unlike)
    record = {**setting.facts(), "records": sections}
    write(given.work / name, record, markdown)


if __name__ == "__main__":
    main()
