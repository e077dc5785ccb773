"""The page of ``mergekit-fisher evaluate``: scores, merges side by side, and what was measured of the models."""

from collections.abc import Iterable, Sequence
from functools import partial

from fisher_mask_mergekit.evaluation.bootstrap import Estimate
from fisher_mask_mergekit.evaluation.scores import Results
from fisher_mask_mergekit.evaluation.table import basis, difference_rows, score_rows
from fisher_mask_mergekit.pages.html import (
    Html,
    Section,
    element,
    figure,
    joined,
    number,
    page,
    sentence,
    table,
)
from fisher_mask_mergekit.pages.model_panel import Panel, model_sections
from fisher_mask_mergekit.pages.score_pictures import score_bars
from fisher_mask_mergekit.pages.text import clean, headings
from fisher_mask_mergekit.preview.inspection import sidecar_or_reason
from fisher_mask_mergekit.recipe import Recipe


def evaluation_page(recipe: Recipe, results: Results) -> str:
    """A page about merges.

    Args:
        recipe: What was merged; of its models, those measurements are shown that can be read.
        results: The merges' scores.
    """
    models = [model for model in recipe.models if model.is_merged]
    names = headings([model.name for model in models])
    panels = [Panel(name, *sidecar_or_reason(model)) for name, model in zip(names, models, strict=True)]
    lead = sentence(
        f"{len(results.merges)} merge{'s' * (len(results.merges) > 1)} of ",
        recipe.path.name,
        ", scored on each model's own task beside that model. Below every picture are its numbers.",
    )
    note = sentence(basis(results, partial(clean, limit=120)))
    scores = joined([table("Scores", *_headed(score_rows(results))), element("p", note, class_="note")])
    sections = [
        Section("scores", "Scores", scores),
        Section("bars", "Merges side by side", _pictures(results)),
    ]
    if len(results.merges) > 1:
        sections.append(Section("differences", "Differences", _differences(results)))
    return page(f"Merges of {clean(recipe.path.name, 80)}", lead, [*sections, *model_sections(panels)])


def _headed(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The head, and the rows with a name each: in print, a task's is on its first row only."""
    names: list[str] = []
    for cells in rows[1:]:
        names.append(cells[0] or names[-1])
    return rows[0], [[name, *cells[1:]] for name, cells in zip(names, rows[1:], strict=True)]


def _pictures(results: Results) -> Html:
    """One picture per task, and one of the means over tasks."""
    tasks: list[tuple[str, list[tuple[str, Estimate]]]] = [
        (task.task, [(line, task.normalised(line).estimate()) for line in results.merges])
        for task in results.tasks
    ]
    means = [(line, results.over_tasks("mean", line).estimate()) for line in results.merges]
    found = [*tasks, ("Mean over the tasks", means)] if len(tasks) > 1 else tasks
    return element(
        "div",
        joined(_bars(name, scores, f"bars-{place}") for place, (name, scores) in enumerate(found, 1)),
        class_="pictures",
    )


def _bars(name: str, scores: Sequence[tuple[str, Estimate]], prefix: str) -> Html:
    shown = clean(name, 80)
    label = f"Bar chart: normalised scores, {shown}. " + "; ".join(
        f"{clean(line, 60)} {one.value:.1f}" for line, one in scores
    )
    line = " The dotted line is the first merge's score." if len(scores) > 1 else ""
    caption = Html(f"Normalised score with its 95 % interval; the fine-tuned model's own is 100.{line}")
    rows = [
        [line, *(number(value, ".1f") for value in (one.value, one.low, one.high))] for line, one in scores
    ]
    numbers = table(f"Normalised scores, {shown}", ["merge", "normalised", "low", "high"], rows)
    return figure(shown, score_bars(scores, prefix, label), caption, numbers, f"normalised scores, {shown}")


def _differences(results: Results) -> Html:
    first, *others = results.merges
    note = (
        "Of each merge and the first one on the same rows; a tie is a difference whose interval contains 0."
    )
    return joined([element("p", note, class_="note"), *_difference_tables(results, others, first)])


def _difference_tables(results: Results, others: Iterable[str], first: str) -> Iterable[Html]:
    for line in others:
        head, *rows = difference_rows(results, line, first)
        yield table(f"{clean(line, 80)} minus {clean(first, 80)}", ["task", *head[1:-1], "verdict"], rows)
