"""Scores for people and for programs: Markdown and JSON."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from fisher_mask_mergekit.evaluation.bootstrap import RESAMPLES, Estimate, Resampled
from fisher_mask_mergekit.evaluation.scores import OWN, Results, TaskScores

_UNDEFINED = "n/a"
_OVER: tuple[Literal["mean", "median"], ...] = ("mean", "median")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns aligned; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
        for cells in (rows[0], rule, *rows[1:])
    )


def markdown(results: Results) -> str:
    """The table of scores, then what it can tell."""
    parts = [aligned(score_rows(results)), basis(results)]
    first, *others = results.merges
    parts += [f"On the same rows:\n\n{aligned(difference_rows(results, line, first))}" for line in others]
    return "\n\n".join(parts)


def score_rows(results: Results) -> list[list[str]]:
    """The cells of the table of scores; the first row is its head."""
    merged = [name for line in results.merges for name in (line, "normalised")]
    rows = [["task", "metric", OWN, *merged]]
    for task in results.tasks:
        for place, metric in enumerate(task.metrics):
            cells = [task.task if place == 0 else "", metric.name, _text(task.scores[OWN][metric.name])]
            for line in results.merges:
                normalised = _text(task.normalised(line), 1) if place == 0 else ""
                cells += [_text(task.scores[line][metric.name]), normalised]
            rows.append(cells)
    for which in _OVER:
        plain = results.is_one_metric
        metric_name = results.tasks[0].metrics[0].name if plain else ""
        cells = [which, metric_name, _over(results, which, OWN) if plain else ""]
        for line in results.merges:
            normalised = _text(results.over_tasks(which, line), 1)
            cells += [_over(results, which, line) if plain else "", normalised]
        rows.append(cells)
    return rows


def _over(results: Results, which: Literal["mean", "median"], line: str) -> str:
    return _text(results.over_tasks(which, line, normalised=False))


def basis(results: Results, shown: Callable[[str], str] = str) -> str:
    """What the scores were found on, and how far they can be trusted.

    Args:
        results: The scores.
        shown: Makes names from the recipe fit for where the text goes.
    """
    rows = ", ".join(f"{task.rows} of {shown(task.data)} ({shown(task.task)})" for task in results.tasks)
    text = (
        f"Rows: {rows}. In brackets: 95 % interval from {RESAMPLES} resamples of those rows; how much another "
        "fine-tuning would change is not in it."
    )
    lower = dict.fromkeys(t.metrics[0].name for t in results.tasks if not t.metrics[0].higher_is_better)
    if lower:
        text += f" Less {' and '.join(lower)} is better: normalised is fine-tuned / merged x 100."
    if any(math.isnan(task.normalised(line).value) for task in results.tasks for line in results.merges):
        text += f" {_UNDEFINED}: a score that is not above zero, or not defined, has no ratio."
    return text


def difference_rows(results: Results, line: str, minus: str) -> list[list[str]]:
    """The cells of the table of a merge's differences from another; the first row is its head."""
    rows = [[f"{line} minus {minus}", "metric", "difference", ""]]
    for task in results.tasks:
        metric = task.metrics[0]
        found = results.difference(line, minus, task)
        rows.append([task.task, metric.name, _text(found, sign="+"), verdict(found, metric.higher_is_better)])
    mean = results.difference(line, minus)
    rows.append(["mean", "normalised", _text(mean, 1, sign="+"), verdict(mean)])
    return rows


def verdict(difference: Resampled, higher_is_better: bool = True) -> str:
    """Whether a difference is more than the draw of the rows explains."""
    found = difference.estimate()
    if math.isnan(found.low):
        return _UNDEFINED
    if found.is_tie:
        return "a tie"
    return "better" if (found.value > 0) == higher_is_better else "worse"


def _text(number: Resampled, digits: int = 3, sign: str = "") -> str:
    found = number.estimate()
    if math.isnan(found.value):
        return _UNDEFINED
    inside = ", ".join(f"{end:{sign}.{digits}f}" for end in (found.low, found.high))
    return f"{found.value:{sign}.{digits}f} [{inside}]"


def record(results: Results) -> dict[str, Any]:
    """The same as JSON values; what is not defined is null."""
    lines = [OWN, *results.merges]
    first, *others = results.merges
    return {
        "merges": list(results.merges),
        "resamples": RESAMPLES,
        "tasks": [_task_record(task, lines) for task in results.tasks],
        **{
            which: {
                "scores": _estimates(
                    (line, results.over_tasks(which, line, normalised=False)) for line in lines
                )
                if results.is_one_metric
                else None,
                "normalised": _estimates((line, results.over_tasks(which, line)) for line in results.merges),
            }
            for which in _OVER
        },
        "differences": [_difference_record(results, line, first) for line in others],
    }


def _task_record(task: TaskScores, lines: Sequence[str]) -> dict[str, Any]:
    return {
        "task": task.task,
        "model": task.model,
        "data": task.data,
        "rows": task.rows,
        "metrics": [metric.name for metric in task.metrics],
        "scores": {
            metric.name: _estimates((line, task.scores[line][metric.name]) for line in lines)
            for metric in task.metrics
        },
        "normalised": _estimates((line, task.normalised(line)) for line in lines if line != OWN),
    }


def _difference_record(results: Results, line: str, minus: str) -> dict[str, Any]:
    tasks = {}
    for task in results.tasks:
        found, metric = results.difference(line, minus, task), task.metrics[0]
        tasks[task.task] = _values(found.estimate()) | {
            "metric": metric.name,
            "verdict": verdict(found, metric.higher_is_better),
        }
    mean = results.difference(line, minus)
    return {
        "merge": line,
        "minus": minus,
        "tasks": tasks,
        "normalised_mean": _values(mean.estimate()) | {"verdict": verdict(mean)},
    }


def _estimates(numbers: Iterable[tuple[str, Resampled]]) -> dict[str, dict[str, float | None]]:
    return {name: _values(number.estimate()) for name, number in numbers}


def _values(found: Estimate) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in vars(found).items()}
