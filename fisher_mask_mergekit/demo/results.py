"""What the demo found: a table with its sampling error, as text, Markdown and JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from fisher_mask_mergekit.errors import MeasurementError

OWN = "fine-tuned"
AVERAGE = "average"
MERGED = "fisher_mask"
NORMALIZED = "fisher_mask, normalize"


@dataclass(frozen=True)
class Estimate:
    """A number found on held-out rows.

    Attributes:
        value: The number.
        error: Its standard error from the draw of those rows.
    """

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class Results:
    """Who classified which held-out row as labelled.

    Attributes:
        correct: Per line of the table (:data:`OWN`, :data:`AVERAGE`, :data:`MERGED`, :data:`NORMALIZED`) and task, ``[N]``, bool.
    """

    correct: Mapping[str, Mapping[str, numpy.ndarray]]

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks, in the table's order."""
        return list(self.correct[OWN])

    def accuracy(self, line: str, task: str) -> Estimate:
        """Share of correct rows; its standard error is the binomial one."""
        rows = self.correct[line][task]
        share = float(rows.mean())
        return Estimate(share, math.sqrt(share * (1 - share) / len(rows)))

    def normalised_mean(self, line: str, minus: str | None = None) -> Estimate:
        r"""Mean over tasks of merged over own accuracy, times 100, or the difference of two lines' means.

        With :math:`a_n` whether the merge is right on row n (or the difference of two merges' :math:`a_n`),
        :math:`b_n` whether the task's own model is, and :math:`r = \bar a / \bar b`, the squared standard
        error of one task's r is the mean of :math:`((a_n - r b_n) / \bar b)^2` over N. All lines are judged on
        the same rows, so that what they have in common cancels out.

        Args:
            line: Of the table.
            minus: The line to subtract, if any.

        Raises:
            MeasurementError: If a task's own model is right on no row.
        """
        values, squares = [], []
        for task in self.tasks:
            own = self.correct[OWN][task].astype(float)
            if not own.any():
                raise MeasurementError(f"the model fine-tuned on {task} is right on none of {len(own)} rows")
            rows = self.correct[line][task].astype(float)
            if minus is not None:
                rows = rows - self.correct[minus][task]
            ratio = rows.mean() / own.mean()
            values.append(ratio)
            squares.append((((rows - ratio * own) / own.mean()) ** 2).mean() / len(own))
        return Estimate(
            100 * float(numpy.mean(values)), 100 * math.sqrt(float(numpy.sum(squares))) / len(values)
        )

    def table(self) -> str:
        """The table in Markdown, columns aligned."""
        head = ["", *(f"{task} accuracy" for task in self.tasks), "normalised mean"]
        lines = [
            [
                line,
                *(_text(self.accuracy(line, task), 3) for task in self.tasks),
                "100" if line == OWN else _text(self.normalised_mean(line), 1),
            ]
            for line in self.correct
        ]
        widths = [max(len(cells[index]) for cells in (head, *lines)) for index in range(len(head))]
        rule = ["-" * width for width in widths]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
            for cells in (head, rule, *lines)
        )

    def caution(self) -> str:
        """How much the table can tell."""
        counts = ", ".join(f"{len(rows)} of {task}" for task, rows in self.correct[OWN].items())
        gains = "".join(f"{self._gain(line)}\n" for line in (MERGED, NORMALIZED))
        return (
            f"Held-out rows: {counts}. ± is one standard error from the draw of those rows.\n"
            "Normalised: a merge's accuracy in per cent of the fine-tuned model's own; the mean is over the tasks.\n"
            f"{gains}One parent, one seed: how much another seed would change is not in these numbers."
        )

    def _gain(self, line: str) -> str:
        gain = self.normalised_mean(line, minus=AVERAGE)
        if abs(gain.value) <= 2 * gain.error:
            verdict = "within two standard errors: these rows cannot tell the two merges apart"
        else:
            verdict = "beyond two standard errors: more than the draw of these rows explains"
        return (
            f"{line} minus {AVERAGE}, on the same rows: {gain.value:+.1f} ± {gain.error:.1f} normalised points, "
            f"{verdict}."
        )

    def record(self) -> dict[str, object]:
        """The same as JSON values."""
        return {
            "held_out_rows": {task: len(rows) for task, rows in self.correct[OWN].items()},
            "accuracy": {
                line: {task: vars(self.accuracy(line, task)) for task in self.tasks} for line in self.correct
            },
            "normalised_mean": {line: vars(self.normalised_mean(line)) for line in self.correct},
            "minus_average": {
                line: vars(self.normalised_mean(line, minus=AVERAGE)) for line in (MERGED, NORMALIZED)
            },
        }


def _text(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"
