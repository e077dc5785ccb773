"""Bounds on files from anyone: what is too large, too much or no file at all is refused before anything is made of it.

Sidecars are read with safetensors, their metadata and indexes as JSON, recipes as plain YAML: none of these runs
anything. What is in a sidecar is never used as a path.
"""

import json
import math
import stat
import struct
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, SidecarError

MOST_SIDECAR_BYTES = 1 << 30
"""Of mask nodes, or of rows and columns; a full-size one is a folder as large as its checkpoint."""

MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 100_000
"""In one safetensors file."""

MOST_JSON_VALUES = 4_000_000
MOST_CONFIG_BYTES = 16 << 20
"""Of a checkpoint's ``config.json``, which can list tens of thousands of labels."""

MOST_INDEX_BYTES = 64 << 20
"""Of the list of a checkpoint's weight files, which has a line for every tensor."""

MOST_RECIPE_BYTES = 1 << 18
MOST_RECIPE_VALUES = 100_000
"""With aliases written out: a few lines of aliases of aliases would fill the memory."""

LONGEST_STRING = 8192
"""Of a field; names of sites and tensors are shorter still."""

MOST_COUNT = 1 << 40
"""Of heads, neurons, elements, samples, rows, tokens."""

MOST_AXES = 8
_LONGEST_PATH = 4095
_LONGEST_NAME = 255
"""In bytes, of what stands between two slashes of a path or a hub id: what Linux allows."""


def checked_name(name: str) -> str:
    """A path or a hub id, unless no file can have such a name.

    Raises:
        ValueError: If none can.
    """
    whole = name.encode("utf-8", "replace")
    if len(whole) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in whole.split(b"/")):
        raise ValueError(
            f"expected a path or hub id of no more than {_LONGEST_PATH} bytes, {_LONGEST_NAME} between its slashes"
        )
    return name


def read_regular(path: Path, most: int, what: str, raising: type[FisherMaskError]) -> bytes:
    """All of a file.

    Args:
        path: The file, or a link to it.
        most: How many bytes it may have.
        what: What it is to be.
        raising: The error's class.

    Raises:
        FisherMaskError: If it cannot be read, is larger, or is a folder, a pipe or a device.
    """
    check_regular(path, most, what, raising)
    try:
        return path.read_bytes()
    except OSError as error:
        raise raising(f"cannot read {what} {path}: {error.strerror or error}") from error


def check_regular(path: Path, most: int, what: str, raising: type[FisherMaskError]) -> None:
    """Refuse what :func:`read_regular` does not read, for those who read it themselves."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:  # A name with a zero byte in it is a ValueError.
        raise raising(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(state.st_mode):
        raise raising(f"cannot read {what} {path}: it is no file")
    if state.st_size > most:
        raise raising(f"{path} is larger than {most} bytes; that is no {what}")


def read_header(file: BinaryIO, path: Path) -> bytes:
    """A safetensors file's header, which is JSON.

    Raises:
        SidecarError: If there is none, or one too large.
    """
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    header = file.read(min(size, MOST_HEADER_BYTES))
    if not size or len(header) < size:
        raise SidecarError(
            f"{path} is not a whole safetensors file: it is cut short, something else, or has a header of more "
            f"than {MOST_HEADER_BYTES} bytes"
        )
    if header.count(b'"data_offsets"') > MOST_TENSORS:
        raise SidecarError(f"{path} holds more than {MOST_TENSORS:,} tensors")
    return header


def read_json(text: str, path: Path) -> Any:
    """A JSON document.

    Raises:
        SidecarError: If it has too many values.
        ValueError: If it is none.
        RecursionError: If it is nested too deeply.
    """
    if sum(map(text.count, ",[{")) > MOST_JSON_VALUES:
        raise SidecarError(f"{path} has more than {MOST_JSON_VALUES:,} values in its metadata")
    return json.loads(text)


def read_yaml(content: bytes, path: Path) -> Any:
    """A YAML document of plain values.

    Raises:
        RecipeError: If it is none, or too large with its aliases written out.
    """
    try:
        loader = yaml.SafeLoader(content.decode())
        node = loader.get_single_node()
        if node is not None and _written_out(node, {}) > MOST_RECIPE_VALUES:
            raise RecipeError(
                f"{path} has more than {MOST_RECIPE_VALUES:,} values where its aliases (*) are written out; "
                "write a recipe without such"
            )
        return None if node is None else loader.construct_document(node)
    except RecipeError:
        raise
    except Exception as error:  # PyYAML's own, and for a scalar that its tag does not fit nearly any other.
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; infinitely many if it lies in itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node.value, list) else []
        inside = chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inside)
    return known[id(node)]
