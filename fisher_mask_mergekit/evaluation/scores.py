"""Scores of several merges on several tasks, normalised by the fine-tuned models' own, and their differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy

from fisher_mask_mergekit.evaluation.bootstrap import Resampled, bootstrap
from fisher_mask_mergekit.evaluation.metrics import Metric
from fisher_mask_mergekit.evaluation.predictions import Array, Predictions

OWN = "fine-tuned"


@dataclass(frozen=True, eq=False)
class TaskScores:
    """One task's scores.

    Attributes:
        task: The model's short name.
        model: As the recipe names it.
        data: What it was scored on.
        rows: How many samples.
        metrics: The first is normalised.
        scores: By line (:data:`OWN`, then the merges) and metric.
    """

    task: str
    model: str
    data: str
    rows: int
    metrics: tuple[Metric, ...]
    scores: Mapping[str, Mapping[str, Resampled]]

    def first(self, line: str) -> Resampled:
        """A line's score by the metric that is normalised."""
        return self.scores[line][self.metrics[0].name]

    def normalised(self, line: str) -> Resampled:
        """Merged over own score, times 100; own over merged where less is better.

        Not a number where the score that is divided by is not above zero.
        """
        ratio = partial(normalise, higher_is_better=self.metrics[0].higher_is_better)
        return Resampled.of(ratio, self.first(OWN), self.first(line))


def normalise(own: Array, merged: Array, *, higher_is_better: bool) -> Array:
    """Merged over own score, times 100; own over merged where less is better; not a number where the divisor is not above zero."""
    above, below = (merged, own) if higher_is_better else (own, merged)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.where(below > 0, 100 * above / below, numpy.nan)


def score_task(
    task: str,
    model: str,
    data: str,
    metrics: tuple[Metric, ...],
    predictions: Mapping[str, Predictions],
    seed: tuple[int, ...],
) -> TaskScores:
    """Score all lines on the same rows and the same resamples of them.

    Args:
        task: The model's short name.
        model: As the recipe names it.
        data: What it was scored on.
        metrics: The first is normalised.
        predictions: By line.
        seed: Of the resamples.
    """
    count = next(iter(predictions.values())).count
    scorers = {
        (line, metric.name): metric.scorer(given) for line, given in predictions.items() for metric in metrics
    }
    named = {"\n".join(key): scorer for key, scorer in scorers.items()}
    found = bootstrap(named, count, seed)
    scores = {
        line: {metric.name: found[f"{line}\n{metric.name}"] for metric in metrics} for line in predictions
    }
    return TaskScores(task, model, data, count, metrics, scores)


@dataclass(frozen=True, eq=False)
class Results:
    """All tasks' scores.

    Attributes:
        tasks: In the recipe's order.
        merges: The merges' lines, in the order given.
    """

    tasks: Sequence[TaskScores]
    merges: Sequence[str]

    @property
    def is_one_metric(self) -> bool:
        """Whether all tasks are scored alike, so that their scores have a mean."""
        return len({task.metrics[0].name for task in self.tasks}) == 1

    def over_tasks(
        self, which: Literal["mean", "median"], line: str, *, normalised: bool = True
    ) -> Resampled:
        """Mean or median over tasks of a line's scores."""
        parts = [task.normalised(line) if normalised else task.first(line) for task in self.tasks]
        over = numpy.mean if which == "mean" else numpy.median
        return Resampled.of(lambda *values: over(numpy.stack(values), axis=0), *parts)

    def difference(self, line: str, minus: str, task: TaskScores | None = None) -> Resampled:
        """Between two merges: of a task's scores, or of the means of the normalised scores."""
        of = self._mean if task is None else task.first
        return Resampled.of(numpy.subtract, of(line), of(minus))

    def _mean(self, line: str) -> Resampled:
        return self.over_tasks("mean", line)
