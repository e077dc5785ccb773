"""After a merge, and the demo: ``mergekit-fisher heads``, ``demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fisher_mask_mergekit.cli.options import Pooler
from fisher_mask_mergekit.cli.output import errors


def heads(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What was merged.")],
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The merged folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Gets a folder per model of the recipe.")],
    pooler: Pooler = "own",
) -> None:
    """Write a complete checkpoint per task: the merged encoder with the task's own head."""
    with errors():
        from fisher_mask_mergekit.heads import write_heads
        from fisher_mask_mergekit.recipe import read_recipe

        for folder in write_heads(read_recipe(recipe), merged, out, pooler):
            print(folder)


def demo(
    out: Annotated[Path, typer.Option(help="Where to work; must not exist.")] = Path("demo"),
) -> None:
    """Train, measure, merge and compare, on bundled text; a few minutes on two cores, no network."""
    with errors():
        from fisher_mask_mergekit.demo import run_demo

        run_demo(out, say=print)
