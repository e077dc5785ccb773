"""The sidecar of a full diagonal Fisher information: a folder of shards, as large as the checkpoint in float32.

The format is described in ``docs/sidecar.md``.
"""

import json
import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisher_mask_mergekit.blocks import CPU_BYTES, Index, blocks
from fisher_mask_mergekit.errors import SidecarError, first_line
from fisher_mask_mergekit.parameter_records import (
    AnyRecord,
    ParameterMetadata,
    ParameterRecord,
    ParameterSidecar,
    ViewRecord,
    check_records,
)
from fisher_mask_mergekit.seal import damaged, digest, seal
from fisher_mask_mergekit.sidecar import FORMAT_VERSION, check_version, parse
from fisher_mask_mergekit.store import replace_folder, umask
from fisher_mask_mergekit.untrusted import read_header, read_json, read_regular

INDEX = "diagonal_fisher.json"
SHARD_BYTES = 5_000_000_000
"""A shard holds no more than this, unless a single tensor does."""

_MOST_INDEX_BYTES = 1 << 28
_SHARD = r"diagonal_fisher-\d{5}-of-\d{5}\.safetensors"


class TensorRecord(ParameterRecord):
    """One parameter's Fisher information.

    Attributes:
        shard: The file that has it.
        sha256: Of its values there, from when it is written on.
    """

    shard: str = Field(pattern=f"^{_SHARD}$")
    sha256: str = ""


class DiagonalMetadata(ParameterMetadata):
    """Everything about a measurement but its numbers.

    Attributes:
        tensors: The parameters.
    """

    tensors: tuple[TensorRecord, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class DiagonalSidecar(ParameterSidecar):
    """One checkpoint's full diagonal Fisher information, of which nothing is in memory.

    Attributes:
        metadata: What was measured and how.
        folder: Where it is.
    """

    metadata: DiagonalMetadata
    folder: Path
    _checked: set[str] = field(default_factory=set, init=False, repr=False)
    _means: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _files: dict[str, BinaryIO] = field(default_factory=dict, init=False, repr=False)
    _starts: dict[str, dict[str, int]] = field(default_factory=dict, init=False, repr=False)
    """Where in each shard's file each parameter's numbers begin, in bytes."""

    @property
    def source(self) -> str:
        """Where it was read from, for messages."""
        return str(self.folder)

    def _opened(self, shard: str) -> BinaryIO:
        """A shard's file, which stays open: what was checked is what is read, also if another sidecar takes this one's place."""
        if shard not in self._files:
            with _readable(self, shard) as path:
                file = path.open("rb")
                if shard not in self._starts:
                    header = read_header(file, path)
                    self._starts[shard] = {
                        name: 8 + len(header) + entry["data_offsets"][0]
                        for name, entry in json.loads(header).items()
                        if name != "__metadata__"
                    }
            self._files[shard] = file
        return self._files[shard]

    def close(self) -> None:
        """Let go of its files. One that is opened again may be another by then, so what is read is checked again."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._checked.clear()

    def fisher(self, record: AnyRecord, index: Index = ()) -> Tensor:
        """A tensor's Fisher information, or a block of it, float32, on the CPU.

        No more of a shard than the block is in memory, and that for as long as the result lives: the file is mapped.

        Raises:
            SidecarError: If it cannot be read, is damaged, is negative, or is not finite.
        """
        fisher = self._mapped(self._sound(record))
        if isinstance(record, ViewRecord):
            fisher = fisher.as_strided(record.shape, record.strides, record.offset)
        return fisher[index]

    def whole(self, record: AnyRecord) -> TensorRecord:
        """The parameter that a record is of, or of a piece of."""
        found = super().whole(record)
        assert isinstance(found, TensorRecord)
        return found

    def mean_of(self, record: AnyRecord) -> float:
        """Mean over all of a parameter's elements; of a piece of one too, over the whole.

        Raises:
            SidecarError: As of :meth:`fisher`.
        """
        whole = self._sound(record)
        if whole.names[0] not in self._means:
            total = math.fsum(float(block.sum(dtype=torch.float64)) for block in self._blocks(whole))
            self._means[whole.names[0]] = total / max(1, math.prod(whole.shape))
        return self._means[whole.names[0]]

    def _sound(self, record: AnyRecord) -> TensorRecord:
        """The whole parameter of a record, its numbers checked once: a merge asks for many blocks and views."""
        whole = self.whole(record)
        if whole.names[0] not in self._checked:
            self._check(whole)
            self._checked.add(whole.names[0])
        return whole

    def _mapped(self, record: TensorRecord) -> Tensor:
        file, starts = self._opened(record.shard), self._starts[record.shard]
        with _readable(self, record.shard):
            return torch.from_numpy(numpy.memmap(file, "<f4", "c", starts[record.names[0]], record.shape))

    def _blocks(self, record: TensorRecord) -> Iterator[Tensor]:
        """All of a parameter's, in order, each let go before the one after the next is read."""
        return (self._mapped(record)[index] for index in blocks(record.shape, CPU_BYTES // 4))

    def _check(self, record: TensorRecord) -> None:
        name = f"{self.folder / record.shard}: {record.names[0]}"
        if digest(self._blocks(record)) != record.sha256:
            raise damaged(name)
        for block in self._blocks(record):
            if block.numel():
                low, high = torch.aminmax(block)
                if not (float(low) >= 0 and float(high) < float("inf")):
                    raise SidecarError(f"{name} has values that are negative or not finite")


def plan_shards(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which file each tensor goes into, by the order given and no more than :data:`SHARD_BYTES` in a file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return {
        name: f"diagonal_fisher-{number:05}-of-{len(shards):05}.safetensors"
        for number, names in enumerate(shards, 1)
        for name in names
    }


def write_diagonal(
    metadata: DiagonalMetadata, fisher: Callable[[str], Tensor], folder: Path
) -> DiagonalSidecar:
    """Write a sidecar into a temporary folder, then rename it: there is a whole one or none.

    Args:
        metadata: What it is of, and what goes into which shard.
        fisher: Gives a parameter's Fisher information by its first name. Asked shard by shard.
        folder: Where it goes; a sidecar that is there is replaced.

    Raises:
        SidecarError: If it cannot be written; whatever was there is untouched.
    """
    shards: dict[str, list[str]] = {}
    for record in metadata.tensors:
        shards.setdefault(record.shard, []).append(record.names[0])
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        digests: dict[str, str] = {}
        for shard, names in shards.items():
            tensors = {name: fisher(name).to("cpu", torch.float32).contiguous() for name in names}
            digests |= {name: digest([tensor]) for name, tensor in tensors.items()}
            save_file(tensors, temporary / shard)
        records = (
            record.model_copy(update={"sha256": digests[record.names[0]]}) for record in metadata.tensors
        )
        metadata = metadata.model_copy(update={"tensors": tuple(records)})
        (temporary / INDEX).write_text(seal(metadata.model_dump_json(), {}), encoding="utf-8")
        temporary.chmod(0o777 & ~umask())
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask())
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SidecarError(f"cannot write {folder}: {reason}; nothing was written") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return DiagonalSidecar(metadata, folder)


def may_replace_diagonal(folder: Path) -> bool:
    """Whether a folder is such a sidecar, whole or not, or there is none: nothing else may be overwritten."""
    if not folder.exists() and not folder.is_symlink():
        return True
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = [file.name for file in folder.iterdir()]
    return all(name == INDEX or re.fullmatch(_SHARD, name) for name in names)


def read_diagonal(folder: Path) -> DiagonalSidecar:
    """Read a sidecar's index and check its shards' headers. Nothing in it is executed or used as a path.

    Raises:
        SidecarError: If it is not a whole, consistent sidecar of a format this version knows.
    """
    metadata = _read_index(folder / INDEX)
    check_records(metadata, f"{folder}: {INDEX}")
    shards: dict[str, dict[str, TensorRecord]] = {}
    for record in metadata.tensors:
        shards.setdefault(record.shard, {})[record.names[0]] = record
    sidecar = DiagonalSidecar(metadata, folder)
    for shard, records in shards.items():
        _check_shard(sidecar, shard, records)
    return sidecar


def _read_index(path: Path) -> DiagonalMetadata:
    content = read_regular(path, _MOST_INDEX_BYTES, "sidecar", SidecarError)
    try:
        text = content.decode()
        version = read_json(text, path)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SidecarError(
            f"{path} is not the index of a full-size sidecar: it has no format version"
        ) from error
    check_version(path, version, FORMAT_VERSION)
    return parse(DiagonalMetadata, text, {}, path)


def _check_shard(sidecar: DiagonalSidecar, shard: str, records: Mapping[str, TensorRecord]) -> None:
    folder = sidecar.folder
    with _shard(sidecar, shard) as tensors:
        there = set(tensors.keys())
        if odd := sorted(there ^ records.keys()):
            what = "which the index does not know" if odd[0] in there else "which the index says it does"
            verb = "holds" if odd[0] in there else "does not hold"
            raise SidecarError(f"{folder / shard} {verb} '{odd[0]:.100}', {what}")
        for name, record in records.items():
            part = tensors.get_slice(name)
            got = part.get_dtype(), tuple(part.get_shape())
            if got != ("F32", record.shape):
                raise SidecarError(
                    f"{folder / shard}: tensor '{name:.100}': expected F32 {record.shape}, got {got}"
                )


@contextmanager
def _shard(sidecar: DiagonalSidecar, shard: str) -> Iterator[Any]:
    """A shard, mapped into memory only as long as it is looked at."""
    with _readable(sidecar, shard) as path:
        with path.open("rb") as file:
            read_header(file, path)
        with safe_open(path, framework="pt") as tensors:
            yield tensors


@contextmanager
def _readable(sidecar: DiagonalSidecar, shard: str) -> Iterator[Path]:
    """A shard's path, and what is wrong with the file if it cannot be read."""
    path = sidecar.folder / shard
    if not path.is_file():
        shards = {record.shard for record in sidecar.metadata.tensors}
        there = sum((sidecar.folder / other).is_file() for other in shards)
        checkpoint = shlex.quote(sidecar.metadata.checkpoint)
        raise SidecarError(
            f"{sidecar.folder} lacks {shard} ({there} of its {len(shards)} shards are there). Copy the whole folder, or "
            f"measure again:  mergekit-fisher compute {checkpoint} --kind diagonal --data DATASET"
        )
    try:
        yield path
    except OSError as error:
        raise SidecarError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise SidecarError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
