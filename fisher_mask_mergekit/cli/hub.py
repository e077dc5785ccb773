"""Sidecars on the hub: ``mergekit-fisher push``, ``pull``."""

from pathlib import Path
from typing import Annotated

import typer

from fisher_mask_mergekit.cli.output import errors, print_lines, say, silence_loading
from fisher_mask_mergekit.shown import one_line


def push(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SIDECAR", help="A measured checkpoint's folder or hub id, or a sidecar's file."
        ),
    ],
    repo: Annotated[str, typer.Option(help="The repository: ORG/NAME.")],
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is new, make it private.")
    ] = False,
) -> None:
    """Publish a sidecar in a repository on the hub, with a section about it in the repository's card."""
    with errors():
        from fisher_mask_mergekit.sharing.publish import find_measured, publish

        silence_loading()
        published = publish(find_measured(target), repo, create_pr=create_pr, private=private)
        for note in published.notes:
            say(note)
        print_lines([published.url, str(published.reference)])


def pull(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|REFERENCE",
            help="A checkpoint's hub id, with or without @revision; or hub:ORG/NAME/PATH.safetensors[@revision].",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write it there too. [default: the hub library's cache only, where a merge finds it]"
        ),
    ] = None,
) -> None:
    """Fetch a sidecar that somebody published, and compare it with the weights that it lies beside."""
    with errors():
        from fisher_mask_mergekit.sharing.pull import pull as fetch

        silence_loading()
        pulled = fetch(target, out)
        if pulled.note:
            say(pulled.note)
        metadata = pulled.sidecar.metadata
        accuracy = "" if metadata.accuracy is None else f"accuracy {metadata.accuracy:.3f}, "
        data = one_line(str(metadata.settings.data))
        print_lines(
            [
                f"{pulled.reference}: {metadata.samples} samples of {data}, {accuracy}loss {metadata.loss:.4f}, {pulled.path}"
            ]
        )
