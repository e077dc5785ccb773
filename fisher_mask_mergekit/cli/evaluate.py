"""``mergekit-fisher evaluate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fisher_mask_mergekit.cli.output import errors, progress, say, silence_progress_bars


def evaluate(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What was merged.")],
    merged: Annotated[list[str], typer.Argument(metavar="MERGED...", help="Merged folders, side by side.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Rows to draw from each data set. [default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that draw and of the intervals.")] = 0,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric, or several with commas between, the first normalised. [default: the task's own]"
        ),
    ] = None,
    pooler: Annotated[
        Literal["own", "average"], typer.Option(help="Each task's own pooler, or the mean of all.")
    ] = "own",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"] | None,
        typer.Option(help="Dtype of the weights. [default: the recipe's, else float32]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run. [default: cuda, else xpu, mps, cpu]")
    ] = None,
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
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint. No recipe can."),
    ] = False,
) -> None:
    """Score a merge on each task of the recipe, beside the model fine-tuned on it."""
    overrides: dict[str, Any] = {}
    if metric is not None:
        overrides["metric"] = tuple(name.strip() for name in metric.split(","))
    if dtype is not None:
        overrides["dtype"] = dtype
    with errors():
        from fisher_mask_mergekit.evaluation.plan import Options
        from fisher_mask_mergekit.evaluation.report import write_reports
        from fisher_mask_mergekit.prepass import pick_device
        from fisher_mask_mergekit.recipe import read_recipe
        from fisher_mask_mergekit.store import check_writable, write_result

        check_writable(json_file, markdown_file, html_file)
        read = read_recipe(recipe, overrides)
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

            found = run(plan(read, merged, options), where, progress, force=force)
        for note in found.notes:
            say(note)
        print(write_reports(found.results, json_file, markdown_file))
        if html_file is not None:
            from fisher_mask_mergekit.pages.evaluate_page import evaluation_page

            write_result(html_file, evaluation_page(read, found.results).encode())
