"""From what a sidecar says of its measurement to the command that repeats it."""

import json
import shlex
from typing import Any

import torch

from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.shown import one_line
from fisher_mask_mergekit.sidecar import Measurement

_OUT = {"mask": "reproduced.safetensors", "factored": "reproduced.safetensors", "diagonal": "reproduced"}


def checkpoint_of(metadata: Measurement) -> str:
    """The checkpoint's name, with the commit that was measured."""
    return _pinned(metadata.checkpoint, metadata.revision)


def data_of(metadata: Measurement) -> str:
    """The data set's name, with the commit that was measured on."""
    return _pinned(metadata.settings.data or "DATASET", metadata.data.revision)


def _pinned(name: str, revision: str | None) -> str:
    return f"{name.partition('@')[0]}@{revision}" if revision else name


def reproducing_command(metadata: Measurement) -> str:
    """The command that measures the same again, for a shell.

    It names every option that is not the default, and writes to a file of its own: where the sidecar lies, the same
    request would be answered without measuring. Local paths are as they were given, so they lead from the same folder only.
    ``--trust-remote-code`` is nobody's to ask for but whoever runs it.

    Args:
        metadata: A sidecar's, of any kind.
    """
    checkpoint = checkpoint_of(metadata)
    if checkpoint.startswith("-"):  # Not an option.
        checkpoint = f"./{checkpoint}"
    words = ["mergekit-fisher", "compute", checkpoint, "--data", data_of(metadata)]
    for name, value in metadata.settings:
        if name != "data" and value != FisherSettings.model_fields[name].default:
            words += [f"--{name.replace('_', '-')}", _argument(name, value)]
    words += ["--device", _device(metadata.device), "--out", _OUT[metadata.settings.kind]]
    return one_line(shlex.join(words))


def _argument(name: str, value: Any) -> str:
    """A setting as its option takes it; as JSON where a column's name would be taken for several, or for JSON."""
    if name == "text":
        names = [value] if isinstance(value, str) else list(value)
        is_plain = not any("," in one or one.startswith("[") for one in names)
        return ",".join(names) if is_plain else json.dumps(names)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _device(described: str) -> str:
    """The device that a sidecar describes: a GPU by its name, others by their type."""
    try:
        return torch.device(described).type
    except RuntimeError:
        return "cuda"
