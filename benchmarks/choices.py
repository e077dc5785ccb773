"""Which setting is best: every pair of a recipe's checkpoints, merged with each setting of ``fisher_mask``.

    python benchmarks/choices.py RECIPE --work FOLDER --short NAME,NAME

One setting at a time departs from the default (128 samples, ``estimator: sample``, ``mask_placement: post``, ``labels: data``,
``unmasked: average``, seed 0), each with ``normalize: none`` and ``normalize: model``. Then what should not decide a merge, but
may: one model of a pair measured on 16 samples, the other on 512; and a model that was trained for a short while (``--short``
names them), so that its loss and its Fisher information are large, beside one trained to the end. Writes
``choices.json`` and ``choices.md`` into the work folder.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import summary
from compare import arguments, bench, compare, with_settings, write
from ways import AVERAGE, Way, mask

from fisher_mask_mergekit.evaluation.plan import Subject
from fisher_mask_mergekit.evaluation.table import aligned

NORMALIZE = ("none", "model", "layer")
FEW, MANY = 16, 512
PLAIN = (AVERAGE, *(mask(f"normalize {kind}", {"normalize": kind}) for kind in NORMALIZE))
CHANGED: dict[str, dict[str, Any]] = {
    "mask_placement pre": {"mask_placement": "pre"},
    "estimator batch": {"estimator": "batch"},
    "labels sampled": {"labels": "sampled"},
    "labels exact": {"labels": "exact"},
    f"samples {FEW}": {"samples": FEW},
    f"samples {MANY}": {"samples": MANY},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
}
UNMASKED = ("layer", "universal")


def one_at_a_time() -> list[Way]:
    """The default, and everything that departs from it in one setting."""
    ways = list(PLAIN)
    for kind in NORMALIZE[:2]:
        ways += [
            mask(f"{name}, normalize {kind}", {"normalize": kind}, **how) for name, how in CHANGED.items()
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


def unequal_losses(subjects: Sequence[Subject], short: Sequence[str]) -> list[tuple[Subject, Subject]]:
    """Every model trained for a short while with every one trained to the end on another task."""
    ends = [one for one in subjects if one.name not in short]
    return [
        (one, other) for one in subjects if one.name in short for other in ends
        if not one.name.startswith(other.name)
    ]  # fmt: skip


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``choices.json``."""
    return {
        f"{title}, {len(found)} merges": aligned(summary.rows(summary.summaries(found)))
        for title, found in record["records"].items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--short", default="", help="models trained for a short while, with commas between")
    given = parser.parse_args()
    setting = bench(given)
    short = given.short.split(",") if given.short else []
    known = [one.name for one in setting.subjects]
    if unknown := [name for name in short if name not in known]:
        raise SystemExit(f"{given.recipe} has no {unknown[0]}; it has {', '.join(known)}")
    whole = [one for one in setting.subjects if one.name not in short]
    sections = {
        "One setting at a time": compare(setting, list(combinations(whole, 2)), one_at_a_time()),
        f"One model measured on {FEW} samples, the other on {MANY}": compare(
            setting, unequal_samples(whole), PLAIN
        ),
    }
    if short:
        uneven = unequal_losses(setting.subjects, short)
        sections["One model trained for a short while"] = compare(setting, uneven, PLAIN)
    record = {**setting.facts(), "records": sections}
    write(given.work / "choices", record, markdown(record))


if __name__ == "__main__":
    main()
