"""The command ``mergekit-fisher``."""

from typing import Annotated

import typer

from fisher_mask_mergekit import __version__
from fisher_mask_mergekit.cli.after import demo, heads
from fisher_mask_mergekit.cli.before import check, init, inspect, sites
from fisher_mask_mergekit.cli.combine import combine
from fisher_mask_mergekit.cli.compute import compute
from fisher_mask_mergekit.cli.evaluate import evaluate
from fisher_mask_mergekit.cli.hub import pull, push
from fisher_mask_mergekit.cli.launched import is_first, is_launched
from fisher_mask_mergekit.cli.output import say
from fisher_mask_mergekit.cli.tune import tune
from fisher_mask_mergekit.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure the Fisher information of mask nodes, for mergekit's merge method fisher_mask.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "compute" and is_launched():
        if is_first():
            say(f"{context.invoked_subcommand} runs in one process; launch compute alone in several")
        raise typer.Exit(2)


for command in (
    compute,
    combine,
    init,
    sites,
    inspect,
    verify,
    check,
    heads,
    evaluate,
    tune,
    push,
    pull,
    demo,
):
    app.command()(command)


def main() -> None:
    """Run the command."""
    app()
