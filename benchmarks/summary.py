"""Many comparisons in one table: how good each way to merge was, and how often it beat the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy


@dataclass(frozen=True)
class Summary:
    """A way to merge, over several groups of checkpoints.

    Attributes:
        name: The way.
        median: Of the normalised scores of all tasks in all groups, in per cent of the fine-tuned models' own.
        mean: Likewise.
        worst: The smallest of them.
        lowest: How far the mean over tasks falls below the first way's, or stays above it, in the group where it does worst.
        above: In how many groups the mean over tasks is above the first way's.
        groups: In how many it was compared.
        better: In how many of them by more than the draw of the rows explains.
        worse: In how many it is below by more than that.

    A score that is not defined is left out.
    """

    name: str
    median: float
    mean: float
    worst: float
    lowest: float
    above: int
    groups: int
    better: int
    worse: int


def summaries(found: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Of what ``compare`` returned, in the ways' order."""
    results = [one["results"] for one in found]
    first = results[0]["merges"][0]
    return [_summary(name, first, results) for name in results[0]["merges"]]


def _summary(name: str, first: str, results: Sequence[Mapping[str, Any]]) -> Summary:
    scores = [task["normalised"][name]["value"] for one in results for task in one["tasks"]]
    values = numpy.array([score for score in scores if score is not None] or [numpy.nan])
    differences = [
        difference["normalised_mean"]
        for one in results
        for difference in one["differences"]
        if difference["merge"] == name and difference["normalised_mean"]["value"] is not None
    ]
    return Summary(
        name=name,
        median=float(numpy.median(values)),
        mean=float(values.mean()),
        worst=float(values.min()),
        lowest=min((one["value"] for one in differences), default=numpy.nan),
        above=sum(one["value"] > 0 for one in differences),
        groups=0 if name == first else len(differences),
        better=sum(one["verdict"] == "better" for one in differences),
        worse=sum(one["verdict"] == "worse" for one in differences),
    )


def rows(found: Sequence[Summary]) -> list[list[str]]:
    """As a table, its head first."""
    table = [["merge", "median", "mean", "worst", "least gain", "above average", "better / tie / worse"]]
    for one in found:
        ties = one.groups - one.better - one.worse
        compared = [
            f"{one.lowest:+.1f}",
            f"{one.above} of {one.groups}",
            f"{one.better} / {ties} / {one.worse}",
        ]
        table.append(
            [
                one.name,
                *(f"{value:.1f}" for value in (one.median, one.mean, one.worst)),
                *(compared if one.groups else ["", "", ""]),
            ]
        )
    return table
