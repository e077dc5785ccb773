"""Figures that are rows of one table: written as JSON with what they hang on, and printed as a table made from it."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from environment import processor_name

from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.store import write_whole


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The table, by its title."""
    head, *_ = rows = record["rows"]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row.values()] for row in rows]
    return {record["title"]: aligned([list(head), *cells])}


def report(record: Mapping[str, Any], title: str, path: Path) -> None:
    """Write and print what was found.

    Args:
        record: ``rows``, mappings with the same keys, and whatever else the figures hang on.
        title: Of the table.
        path: The JSON file.
    """
    libraries = ("fisher-mask-mergekit", "torch", "safetensors", "pydantic", "pyyaml", "datasets")
    whole = {
        "title": title,
        **record,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in libraries},
    }
    write_whole(path, f"{json.dumps(whole, indent=1)}\n".encode())
    print("\n\n".join(f"{name}:\n\n{table}" for name, table in markdown(whole).items()))
