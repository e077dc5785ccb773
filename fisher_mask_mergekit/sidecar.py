"""The sidecar: Fisher information of one checkpoint's mask nodes, and proof of which checkpoint it was.

The format is described in ``docs/sidecar.md``.
"""

import hashlib
import json
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sites import GovernedTensor, Node, Site, name_template
from fisher_mask_mergekit.store import write_whole

FORMAT_VERSION: Literal[1] = 1
METADATA_KEY = "fisher_mask_mergekit"
VALUES_PER_TENSOR = 16
"""How many values of each governed tensor are kept to recognise the checkpoint by."""

_MAX_FILE_BYTES = 1 << 30
_MAX_HEADER_BYTES = 32 << 20
_STRIDE = 2654435761  # A prime larger than any row, so that the values are spread over rows and columns.


class Record(BaseModel):
    """Something that a sidecar says. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecord(Record):
    """What the samples were, after conventions and defaults were resolved.

    Attributes:
        split: The split.
        revision: The data set's commit on the hub, if that is where it came from.
        text: The text columns.
        label: The label column; None where the text itself is predicted, or every label has a column.
        label_map: The data's label to the checkpoint's label index.
        rows: How many rows the data set has.
        digest: SHA-256 over the drawn rows' texts and labels, in order.
        majority: The share of the drawn rows that have the most frequent label; None where a row has not one of a
            set of labels.
    """

    split: str
    revision: str | None
    text: tuple[str, ...]
    label: str | None
    label_map: dict[str, int]
    rows: int = Field(ge=1)
    digest: str
    majority: float | None = Field(ge=0, le=1)


class Measurement(Record):
    """What was measured, on what, and with what.

    Attributes:
        format_version: Of this file format.
        checkpoint: As the one who measured it named it.
        revision: The checkpoint's commit on the hub; None for a local folder.
        architecture: The checkpoint's class.
        task: What was predicted, see :mod:`~fisher_mask_mergekit.tasks`.
        weights: SHA-256 over the values that :func:`probe` takes of every tensor of the checkpoint.
        settings: The request.
        data: The samples.
        samples: N, how many were measured.
        max_length: Tokens per sample at most.
        truncated: How many samples were longer than that.
        accuracy: Mean over samples of the share of right predictions; None where none can be right.
        loss: Mean over samples of their loss, in nats.
        versions: Of the libraries that took part.
        device: What it ran on.
        date: When, ISO 8601 in UTC.
    """

    format_version: Literal[1]
    checkpoint: str = Field(min_length=1)
    revision: str | None
    architecture: str
    task: str
    weights: str
    settings: FisherSettings
    data: DataRecord
    samples: int = Field(ge=1)
    max_length: int = Field(ge=1)
    truncated: int = Field(ge=0)
    accuracy: float | None = Field(ge=0, le=1)
    loss: float = Field(allow_inf_nan=False)
    versions: dict[str, str]
    device: str
    date: str

    @property
    def described_checkpoint(self) -> str:
        """The checkpoint's name and revision, for messages."""
        return f"'{self.checkpoint}'" + (f" (revision {self.revision[:7]})" if self.revision else "")


class Metadata(Measurement):
    """Everything about mask nodes but their numbers.

    Attributes:
        sites: Where the mask nodes are and what they govern.
    """

    sites: tuple[Site, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class Sidecar:
    """One checkpoint's Fisher information.

    Attributes:
        metadata: What was measured and how.
        fisher: Per site's output projection, its Fisher vectors, float32.
        values: Per governed tensor, some of its values, see :func:`probe`.
        source: Where it was read from, for messages.
    """

    metadata: Metadata
    fisher: Mapping[str, Mapping[Node, Tensor]]
    values: Mapping[str, Tensor]
    source: str = ""

    @cached_property
    def governed(self) -> dict[str, tuple[Site, GovernedTensor]]:
        """Tensor name, in the files or in the loaded model, to its site and what governs its rows."""
        return {tensor.name: (site, tensor) for site in self.metadata.sites for tensor in site.tensors}

    @cached_property
    def _by_template(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.governed:
            names.setdefault(name_template(name), []).append(name)
        return names

    @cached_property
    def means(self) -> dict[Node, float]:
        """Mean Fisher information over all of the checkpoint's nodes of a kind."""
        vectors: dict[Node, list[Tensor]] = {}
        for site in self.fisher.values():
            for node, vector in site.items():
                vectors.setdefault(node, []).append(vector.flatten())
        return {node: float(torch.cat(found).double().mean()) for node, found in vectors.items()}

    def identify(self, name: str, tensor: Tensor) -> tuple[Site, GovernedTensor] | None:
        """Which of the checkpoint's tensors this is, told by its values.

        A merge knows its inputs by the output's name. Where layers were moved, that is another layer's
        name, and only the values tell. If the tensor has the stored values of the name it goes by, that
        name is right; else the same tensor of another layer is looked for.

        Args:
            name: The name it goes by.
            tensor: The tensor, in any floating-point dtype and on any device.

        Returns:
            Its site and what governs its rows; None if no mask node governs tensors of such a name.

        Raises:
            SidecarMismatchError: If the values are not this checkpoint's, or fit several layers.
        """
        family = self._by_template.get(name_template(name))
        if family is None:
            return None
        return self.governed[which_tensor(name, tensor, family, self._fits, self._about)]

    @property
    def _about(self) -> str:
        return f"sidecar '{self.source}' was measured on {self.metadata.described_checkpoint}"

    def _fits(self, name: str, shape: torch.Size, got: Tensor) -> bool:
        if tuple(shape) != self.governed[name][1].shape:
            return False
        return torch.equal(self.values[name][: len(got)].to(got.dtype), got)


def which_tensor(
    name: str,
    tensor: Tensor,
    family: Sequence[str],
    fits: Callable[[str, torch.Size, Tensor], bool],
    about: str,
) -> str:
    """Which of a checkpoint's tensors this is: the one of that name if its values fit, else the only one that fits.

    Args:
        name: The name it goes by.
        tensor: The tensor.
        family: The names of the same tensor in all layers.
        fits: Whether a shape and probed values are those that are kept of a name.
        about: Whose tensors, for messages.

    Raises:
        SidecarMismatchError: If none fits, or several.
    """
    got = probe(tensor)
    if name in family and fits(name, tensor.shape, got):
        return name
    found = [other for other in family if other != name and fits(other, tensor.shape, got)]
    if len(found) == 1:
        return found[0]
    what = f"fits several layers ({', '.join(found[:3])})" if found else "has other values"
    raise SidecarMismatchError(f"{about}: tensor '{name}' {what}")


def probe(tensor: Tensor) -> Tensor:
    """The values a tensor is recognised by, ``[min(16, numel)]``, in its own dtype, on the CPU.

    Value k is at ``(k * 2654435761) mod numel`` in row-major order.
    """
    positions = torch.tensor(probed_positions(tensor.numel()), device=tensor.device, dtype=torch.long)
    return tensor.detach().reshape(-1)[positions].cpu()


def probed_positions(count: int) -> list[int]:
    """Where in row-major order :func:`probe` takes its values of a tensor of ``count`` elements."""
    return [value * _STRIDE % count for value in range(min(VALUES_PER_TENSOR, count))]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and probed values of all of a checkpoint's tensors, in order of their names."""
    lines = {
        name: f"{name} {list(tensor.shape)} {probe(tensor).double().tolist()}\n" for name, tensor in tensors
    }
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def write(sidecar: Sidecar, path: Path) -> None:
    """Write a sidecar under a temporary name, then rename it: there is a whole file or none.

    Raises:
        SidecarError: If it cannot be written; whatever was at ``path`` is untouched.
    """
    tensors = {
        f"{output}.{node}": vector.clone(memory_format=torch.contiguous_format)
        for output, vectors in sidecar.fisher.items()
        for node, vector in vectors.items()
    }
    tensors["values"] = _pack(sidecar.values[name] for name in sidecar.governed)
    content = save(tensors, {METADATA_KEY: sidecar.metadata.model_dump_json()})
    try:
        write_whole(path, content)
    except OSError as error:
        raise SidecarError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error


def _pack(values: Iterable[Tensor]) -> Tensor:
    """The kept values of all governed tensors as one matrix ``[G, 16]``, short rows filled with zeros."""
    rows = list(values)
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    packed = torch.zeros(len(rows), VALUES_PER_TENSOR, dtype=dtype)
    for target, row in zip(packed, rows, strict=True):
        target[: len(row)] = row
    return packed


def read(path: Path) -> Sidecar:
    """Read and check a sidecar. It is not trusted: nothing in it is executed or used as a path.

    Raises:
        SidecarError: If it is not a whole, consistent sidecar of a format this version knows.
    """
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise SidecarError(f"cannot read sidecar {path}: it is no file")
        if state.st_size > _MAX_FILE_BYTES:
            raise SidecarError(f"{path} is larger than {_MAX_FILE_BYTES} bytes; that is no sidecar")
        content = path.read_bytes()
    except OSError as error:
        raise SidecarError(f"cannot read sidecar {path}: {error.strerror or error}") from error
    metadata = _read_metadata(content, path)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SidecarError(f"{path} is not a whole safetensors file: {error}") from error
    sidecar = _assemble(metadata, tensors, path)
    for output, vectors in sidecar.fisher.items():
        for node, vector in vectors.items():
            if not bool((vector.isfinite() & (vector >= 0)).all()):
                raise SidecarError(f"{path}: {output}.{node} has values that are negative or not finite")
    return sidecar


def may_replace(path: Path) -> bool:
    """Whether a file is a sidecar of whatever version, or there is none: nothing else may be overwritten."""
    try:
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            return METADATA_KEY.encode() in file.read(min(size, _MAX_HEADER_BYTES))
    except FileNotFoundError:
        return True
    except NotADirectoryError as error:
        raise SidecarError(f"cannot write {path}: {error.strerror}; nothing was written") from error
    except (OSError, ValueError, struct.error):
        return False


def _read_metadata(content: bytes, path: Path) -> Metadata:
    size = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    if not 0 < size <= min(len(content) - 8, _MAX_HEADER_BYTES):
        raise SidecarError(f"{path} is not a whole safetensors file: it is cut short, or no such file at all")
    try:
        header: Any = json.loads(content[8 : 8 + size])
        text = header["__metadata__"][METADATA_KEY]
        raw: Any = json.loads(text)
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SidecarError(
            f"{path} is not a sidecar of fisher-mask-mergekit: it has no such metadata"
        ) from error
    check_version(path, version, FORMAT_VERSION)
    try:
        return Metadata.model_validate_json(text)
    except ValidationError as error:
        raise bad_field(path, error) from error


def check_version(path: Path, version: Any, known: int) -> None:
    """Refuse a format that this program does not read.

    Raises:
        SidecarError: If it is another.
    """
    if version != known:
        raise SidecarError(
            f"{path} has format version {version!r:.20}, this program reads {known}; "
            "upgrade fisher-mask-mergekit, or measure the checkpoint again"
        )


def bad_field(path: Path, error: ValidationError) -> SidecarError:
    """The first field that is not as it must be."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return SidecarError(f"{path}: metadata field '{where:.80}': {first['msg']:.200}")


def _assemble(metadata: Metadata, tensors: Mapping[str, Tensor], path: Path) -> Sidecar:
    expected: dict[str, tuple[int, ...]] = {
        f"{site.output}.{node}": shape for site in metadata.sites for node, shape in site.nodes().items()
    }
    names = [tensor.name for site in metadata.sites for tensor in site.tensors]
    expected["values"] = (len(names), VALUES_PER_TENSOR)
    if len(set(names)) != len(names) or len({site.output for site in metadata.sites}) != len(metadata.sites):
        raise SidecarError(f"{path}: metadata names a site or a tensor twice")
    for name in expected.keys() | tensors.keys():
        got = tuple(tensors[name].shape) if name in tensors else "no such tensor"
        want = expected.get(name, "no such tensor")
        if got != want:
            raise SidecarError(f"{path}: tensor '{name:.100}': expected {want}, got {got}")
        if tensors[name].dtype not in (torch.float32, torch.float64):
            raise SidecarError(f"{path}: tensor '{name:.100}': expected float32, got {tensors[name].dtype}")
    fisher = {
        site.output: {node: tensors[f"{site.output}.{node}"] for node in site.nodes()}
        for site in metadata.sites
    }
    return Sidecar(metadata, fisher, dict(zip(names, tensors["values"], strict=True)), str(path))
