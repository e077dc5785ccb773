"""Results as files."""

import json
from pathlib import Path

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.evaluation.scores import Results
from fisher_mask_mergekit.evaluation.table import markdown, record
from fisher_mask_mergekit.store import write_whole


def check_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before anything is run.

    Raises:
        RecipeError: If a path is a folder, or lies in none.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            why = "it is a folder" if path.is_dir() else "its folder does not exist"
            raise RecipeError(f"cannot write {path}: {why}")


def write_reports(results: Results, json_file: Path | None, markdown_file: Path | None) -> str:
    """Write what was asked for.

    Returns:
        The Markdown.

    Raises:
        RecipeError: If a file cannot be written.
    """
    text = markdown(results)
    for path, content in ((json_file, json.dumps(record(results), indent=2)), (markdown_file, text)):
        if path is not None:
            try:
                write_whole(path, f"{content}\n".encode())
            except OSError as error:
                raise RecipeError(f"cannot write {path}: {error.strerror or error}") from error
    return text
