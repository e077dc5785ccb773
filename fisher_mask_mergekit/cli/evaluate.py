"""``mergekit-fisher evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from fisher_mask_mergekit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Metric,
    Pooler,
    TrustRemoteCode,
    scoring_overrides,
)
from fisher_mask_mergekit.cli.output import errors, print_lines, progress, say, silence_progress_bars


def evaluate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What was merged.")],
    merged: Annotated[list[str], typer.Argument(metavar="MERGED...", help="Merged folders, side by side.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Rows to draw from each data set. [default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that draw and of the intervals.")] = 0,
    metric: Metric = None,
    pooler: Pooler = "own",
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    device: Device = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, with commas between, for causal LMs; in place of the recipe's data."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON too.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the printed tables there too.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the results there as a page with pictures too."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run every model again, also where its predictions are cached.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a merge on each task of the recipe, beside the model fine-tuned on it."""
    with errors():
        from fisher_mask_mergekit.evaluation.plan import Options
        from fisher_mask_mergekit.evaluation.report import write_reports
        from fisher_mask_mergekit.execution import pick_device
        from fisher_mask_mergekit.recipe import read_recipe
        from fisher_mask_mergekit.store import check_writable, write_result

        check_writable(json_file, markdown_file, html_file)
        read = read_recipe(recipe, scoring_overrides(metric, dtype))
        options = Options(samples, seed, batch_size, pooler, trust_remote_code)
        silence_progress_bars()
        where = pick_device(device)
        if lm_eval is not None:
            from fisher_mask_mergekit.evaluation.harness import harness

            names = tuple(name.strip() for name in lm_eval.split(","))
            found = harness(read, merged, names, where, options, force=force)
        else:
            from fisher_mask_mergekit.evaluation.plan import plan
            from fisher_mask_mergekit.evaluation.run import evaluate as run

            found = run(plan(read, merged, options), where, progress, _say_waiting, force=force)
        for note in found.notes:
            say(note)
        print_lines(write_reports(found.results, json_file, markdown_file).split("\n"))
        if html_file is not None:
            from fisher_mask_mergekit.pages.evaluate_page import evaluation_page

            write_result(html_file, evaluation_page(read, found.results).encode())


def _say_waiting(name: str) -> None:
    say(f"{name}: waiting for another process that runs the same")
