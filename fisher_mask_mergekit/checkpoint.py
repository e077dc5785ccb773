"""A checkpoint as files: where it lies, which revision it is, and what its tensors hold."""

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from fisher_mask_mergekit.errors import CheckpointError, FisherMaskError, first_line
from fisher_mask_mergekit.untrusted import MOST_CONFIG_BYTES, MOST_INDEX_BYTES, check_regular

# The same files that mergekit fetches, vocabularies, and code, which nothing runs without --trust-remote-code;
# a published sidecar comes along.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
)
_STEMS = ("model.safetensors", "pytorch_model.bin")
_LEGACY_NAMES = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), "a string"),
    "auto_map": (lambda value: isinstance(value, dict), "an object"),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of strings",
    ),
}
"""Of a configuration, what is looked at before transformers makes anything of it; all may be left out."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: As the user named it: a local folder, or a hub id with or without ``@revision``; either with
            ``+adapter`` behind it.
        folder: Where its files are.
        revision: The hub's commit, None for a local folder.
    """

    name: str
    folder: Path
    revision: str | None


def locate(name: str) -> Checkpoint:
    """Find a checkpoint's files; download them if it is a hub id.

    Args:
        name: Local folder, or hub id with or without ``@revision``; with ``+adapter``, the adapter is applied.

    Raises:
        CheckpointError: If it is neither, or has no configuration.
    """
    if "+" in name and not Path(name).exists():
        from fisher_mask_mergekit.adapter import apply_adapter

        return apply_adapter(name)
    path, _, wanted = name.partition("@")
    if Path(name).is_dir():
        checkpoint = Checkpoint(name, Path(name), None)
    elif Path(name).exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder or a hub id")
    elif name.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {name}")
    else:
        try:
            folder = Path(snapshot_download(path, revision=wanted or None, allow_patterns=_HUB_FILES))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(path, revision=wanted or None, allow_patterns=["*.bin"]))
        except Exception as error:  # The hub library raises its own, the HTTP library's and ValueErrors.
            raise CheckpointError(
                f"{name} is neither a folder here nor a checkpoint to be had from the hub: {first_line(error)}"
            ) from error
        checkpoint = Checkpoint(name, folder, folder.name)
    if not (checkpoint.folder / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json (looked in {checkpoint.folder})")
    check_sizes(checkpoint)
    return checkpoint


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse a configuration or an index of weights that is too large to be one, before anybody reads all of it.

    Raises:
        CheckpointError: If there is such a file, or what has its name is a folder, a pipe or a device.
    """
    bounds = {"config.json": MOST_CONFIG_BYTES}
    bounds |= {f"{stem}.index.json": MOST_INDEX_BYTES for stem in _STEMS}
    for name, most in bounds.items():
        file = checkpoint.folder / name
        if file.exists():
            check_regular(file, most, "part of a checkpoint", CheckpointError)


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        CheckpointError: If it is not a JSON object, or what is read of it here is of another type than transformers writes.
    """
    try:
        config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint.name}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{checkpoint.name}: config.json is not a JSON object")
    for field, (is_one, what) in _FIELDS.items():
        if config.get(field) is not None and not is_one(config[field]):
            given = reprlib.repr(config[field])
            raise CheckpointError(f"{checkpoint.name}: config.json has {field} {given}, expected {what}")
    return config


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, without reading their values.

    Names that transformers still reads but renames (``LayerNorm.gamma``) are given as it renames them.

    Raises:
        CheckpointError: If there are no weights, or they cannot be read.
    """
    return {modern(name): shape for name, shape in stored_shapes(checkpoint).items()}


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The same under the names that the files have.

    Raises:
        CheckpointError: If there are no weights, or they cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(checkpoint):
        with _open(checkpoint, file) as tensors:
            shapes |= {name: tuple(tensors.shape(name)) for name in tensors.names()}
    return shapes


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors as they are stored, one at a time and in no particular order.

    Raises:
        CheckpointError: If one is missing, or the weights cannot be read.
    """
    wanted = set(names)
    for file in _weight_files(checkpoint):
        with _open(checkpoint, file) as tensors:
            for name in tensors.names():
                if modern(name) in wanted:
                    wanted.discard(modern(name))
                    yield modern(name), tensors.read(name)
    if wanted:
        raise CheckpointError(f"{checkpoint.name} has no tensor {min(wanted)} in its weight files")


def side_files(checkpoint: Checkpoint) -> set[Path]:
    """The files that a model is made of beside its weights: configurations, the tokenizer, code."""
    patterns = ("config.json", "generation_config.json", *TOKENIZER_FILES, "*.py")
    return {file for pattern in patterns for file in checkpoint.folder.glob(pattern) if file.is_file()}


def model_files(checkpoint: Checkpoint) -> list[Path]:
    """All files that a model is made of.

    Raises:
        CheckpointError: If there are no weights.
    """
    return [file for file in (*_weight_files(checkpoint), *side_files(checkpoint)) if file.is_file()]


def file_states(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of the last change of these files, by which a later change shows.

    Raises:
        CheckpointError: If there are no weights.
    """
    states = {}
    for file in model_files(checkpoint):
        with suppress(FileNotFoundError):
            state = file.stat()
            states[file.name] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return states


def modern(name: str) -> str:
    """A tensor's name as transformers calls it, where that is not what old files call it."""
    for modern, legacy in _LEGACY_NAMES.items():
        if name.endswith(legacy):
            return name.removesuffix(legacy) + modern
    return name


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The weight files that mergekit and transformers would read."""
    for stem in _STEMS:
        index = checkpoint.folder / f"{stem}.index.json"
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                names = sorted({Path(name).name for name in listed})
                if any(not name.endswith(Path(stem).suffix) for name in names):
                    raise ValueError  # An index of safetensors must not lead to a pickle.
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{checkpoint.name}: {index.name} is not an index of weights"
                ) from error
            return [checkpoint.folder / name for name in names]
        if (checkpoint.folder / stem).is_file():
            return [checkpoint.folder / stem]
    raise CheckpointError(f"{checkpoint.name} has no model.safetensors or pytorch_model.bin")


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def names(self) -> Iterable[str]:
        return self._handle.keys()

    def shape(self, name: str) -> list[int]:
        return self._handle.get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


class _Pickled:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def names(self) -> Iterable[str]:
        return self._state.keys()

    def shape(self, name: str) -> Iterable[int]:
        return self._state[name].shape

    def read(self, name: str) -> Tensor:
        return self._state[name]


@contextmanager
def _open(checkpoint: Checkpoint, file: Path) -> Iterator[_Safetensors | _Pickled]:
    with ExitStack() as stack:
        try:
            if file.suffix == ".safetensors":
                opened: _Safetensors | _Pickled = _Safetensors(
                    stack.enter_context(safe_open(file, framework="pt"))
                )
            else:
                # torch's old format, from before its files were zip archives, cannot be mapped into memory.
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
                if not isinstance(state, dict) or not all(
                    isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
                ):
                    raise CheckpointError(f"{checkpoint.name}: {file.name} holds other things than tensors")
                opened = _Pickled(state)
        except FisherMaskError:
            raise
        except Exception as error:  # Of a damaged file, torch raises whatever its bytes happen to lead to.
            raise CheckpointError(
                f"{checkpoint.name}: cannot read {file.name}: {first_line(error)}"
            ) from error
        yield opened


@contextmanager
def transformers_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers says of a checkpoint into one error."""
    try:
        yield
    except FisherMaskError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError and others.
        raise CheckpointError(f"transformers cannot load {checkpoint.name}: {first_line(error)}") from error
