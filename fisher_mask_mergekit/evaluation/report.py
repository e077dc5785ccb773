"""Results as files."""

import json
from pathlib import Path

from fisher_mask_mergekit.evaluation.scores import Results
from fisher_mask_mergekit.evaluation.table import markdown, record
from fisher_mask_mergekit.store import write_result


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
            write_result(path, f"{content}\n".encode())
    return text
