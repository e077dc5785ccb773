"""``mergekit-fisher combine``."""

from pathlib import Path
from typing import Annotated

import typer

from fisher_mask_mergekit.cli.output import errors, print_lines


def combine(
    shares: Annotated[
        list[Path],
        typer.Argument(
            metavar="SIDECAR...",
            help="The sidecars of all shares that compute --share measured, in any order.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the sidecar of the whole.")],
) -> None:
    """Add up the sidecars of all shares of one measurement."""
    with errors():
        from fisher_mask_mergekit.combine import combine as add_up

        metadata = add_up(shares, out).metadata
        accuracy = "" if metadata.accuracy is None else f"accuracy {metadata.accuracy:.3f}, "
        print_lines(
            [f"{out}: {metadata.samples} samples in {len(shares)} shares, {accuracy}loss {metadata.loss:.4f}"]
        )
