"""The sidecar: Fisher information of one checkpoint's mask nodes, and proof of which checkpoint it was.

The format is described in ``docs/sidecar.md``.
"""

import hashlib
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisher_mask_mergekit.checkpoint import modern
from fisher_mask_mergekit.errors import SidecarError, SidecarShareError
from fisher_mask_mergekit.recognition import VALUES_PER_TENSOR, Recognition, probe
from fisher_mask_mergekit.seal import seal, unseal
from fisher_mask_mergekit.settings import RANDOM, FisherSettings
from fisher_mask_mergekit.shown import one_line
from fisher_mask_mergekit.sites import Count, GovernedTensor, Node, Positive, Site, name_template
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.untrusted import (
    LONGEST_STRING,
    MOST_SIDECAR_BYTES,
    read_header,
    read_json,
    read_regular,
)

FORMAT_VERSION: Literal[1] = 1
METADATA_KEY = "fisher_mask_mergekit"
FACTORED_KEY = "fisher_mask_mergekit_factored"


class Record(BaseModel):
    """Something that a sidecar says. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=LONGEST_STRING)


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
    rows: Positive
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
        weights: SHA-256 over some values of every tensor of the checkpoint, see :func:`digest_of`.
        settings: The request.
        trust_remote_code: Whether code that comes with the checkpoint might run.
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
    trust_remote_code: bool = False
    data: DataRecord
    samples: Positive
    max_length: Positive
    truncated: Count
    accuracy: float | None = Field(ge=0, le=1)
    loss: float = Field(allow_inf_nan=False)
    versions: dict[str, str]
    device: str
    date: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.truncated <= self.samples <= self.data.rows:
            raise ValueError("expected no more truncated than samples, and no more samples than rows")
        return self

    @property
    def described_checkpoint(self) -> str:
        """The checkpoint's name and revision, for messages."""
        return f"'{one_line(self.checkpoint)}'" + (
            f" (revision {self.revision[:7]})" if self.revision else ""
        )

    @property
    def described_data(self) -> str:
        """Where the samples were drawn from, for people."""
        if self.settings.data == RANDOM:
            return "random tokens"
        commit = f" at {self.data.revision[:7]}" if self.data.revision else ""
        return f"{self.settings.data}{commit}, split {self.data.split}, {self.data.rows} rows"


AnyMetadata = TypeVar("AnyMetadata", bound=Record)


class OfAnyKind(Protocol):
    """What sidecars of all kinds have."""

    @property
    def metadata(self) -> Measurement:
        """What was measured and how."""

    @property
    def source(self) -> str:
        """Where it was read from, for messages."""


AnyKind = TypeVar("AnyKind", bound=OfAnyKind)


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
        fisher: Per site's output projection, its Fisher vectors, of :func:`fisher_dtype`.
        values: Per governed tensor, some of its values, see :func:`~fisher_mask_mergekit.recognition.probe`.
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
    def _recognition(self) -> Recognition:
        known = {name: (tensor.shape, self.values[name]) for name, (_, tensor) in self.governed.items()}
        return Recognition(
            known, f"sidecar '{self.source}' was measured on {self.metadata.described_checkpoint}"
        )

    def governs_any(self, names: Iterable[str]) -> bool:
        """Whether it governs a tensor of such a name, in whatever layer, and with whatever more in front of one of both."""
        known, given = ({name_template(name) for name in some} for some in (self.governed, names))
        return bool(known & _endings(given) or given & _endings(known))

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
        known = self._recognition.which(modern(name), tensor)
        return None if known is None else self.governed[known]


def _endings(names: Iterable[str]) -> set[str]:
    """The names, and what remains of them without their first parts."""
    return {name.split(".", cut)[-1] for name in names for cut in range(name.count(".") + 1)}


def fisher_dtype(settings: FisherSettings) -> torch.dtype:
    """Of the numbers in a sidecar: what is still to be added to others is rounded afterwards."""
    return torch.float32 if settings.share is None else torch.float64


def whole(sidecar: AnyKind) -> AnyKind:
    """The same, unless it was measured on a share of the samples only.

    Raises:
        SidecarShareError: If it was.
    """
    if (share := sidecar.metadata.settings.share) is not None:
        raise SidecarShareError(
            f"{sidecar.source} is share {share} of a measurement, not all of it. Add it to the other shares:  "
            "mergekit-fisher combine SHARE... --out SIDECAR"
        )
    return sidecar


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
    content = save(tensors, {METADATA_KEY: seal(sidecar.metadata.model_dump_json(), tensors)})
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
    content = read_regular(path, MOST_SIDECAR_BYTES, "sidecar", SidecarError)
    header = read_header(BytesIO(content), path)
    if f'"{FACTORED_KEY}"'.encode() in header:
        raise SidecarError(
            f"{path} is a sidecar of rows and columns, which fisher_mask takes with nodes: all; it has no mask nodes"
        )
    text = metadata_text(header, path, METADATA_KEY, "sidecar of fisher-mask-mergekit")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SidecarError(f"{path} is not a whole safetensors file: {error}") from error
    metadata = parse(Metadata, text, tensors, path)
    sidecar = _assemble(metadata, tensors, path)
    for output, vectors in sidecar.fisher.items():
        for node, vector in vectors.items():
            if not bool((vector.isfinite() & (vector >= 0)).all()):
                raise SidecarError(f"{path}: {output}.{node} has values that are negative or not finite")
    return sidecar


def may_replace(path: Path) -> bool:
    """Whether a file is a sidecar of whatever version, or there is none: nothing else may be overwritten."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return METADATA_KEY.encode() in read_header(file, path)
    except FileNotFoundError:
        return True
    except NotADirectoryError as error:
        raise SidecarError(f"cannot write {path}: {error.strerror}; nothing was written") from error
    except (OSError, ValueError, SidecarError):
        return False


def metadata_text(header: bytes, path: Path, key: str, what: str) -> str:
    """The sealed metadata in a safetensors file's header.

    Args:
        header: The header.
        path: Where it is, for messages.
        key: What the metadata goes by.
        what: What the file should be, for messages.

    Raises:
        SidecarError: If there is none, or it is of another version.
    """
    try:
        text = read_json(header.decode(), path)["__metadata__"][key]
        version = read_json(text, path)["format_version"]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise SidecarError(f"{path} is not a {what}: it has no such metadata") from error
    check_version(path, version, FORMAT_VERSION)
    return str(text)


def check_version(path: Path, version: Any, known: int) -> None:
    """Refuse a format that this program does not read.

    Raises:
        SidecarError: If it is another.
    """
    if version != known:
        raise SidecarError(
            f"{path} has format version {reprlib.repr(version)}, this program reads {known}; "
            "upgrade fisher-mask-mergekit, or measure the checkpoint again"
        )


def parse(kind: type[AnyMetadata], text: str, tensors: Mapping[str, Tensor], path: Path) -> AnyMetadata:
    """Metadata that is whole and as it must be.

    Args:
        kind: Its class.
        text: It, sealed.
        tensors: What it was sealed with.
        path: Where it is, for messages.

    Raises:
        SidecarError: If its checksum is of something else, or a field is not as it must be (names the first).
    """
    try:
        return kind.model_validate_json(unseal(text, tensors, path))
    except ValidationError as error:
        raise _bad_field(path, error) from error


def _bad_field(path: Path, error: ValidationError) -> SidecarError:
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
        dtype = fisher_dtype(metadata.settings)
        if tensors[name].dtype != dtype and not (
            name == "values" and tensors[name].dtype in (torch.float32, torch.float64)
        ):
            expected_dtype = str(dtype).removeprefix("torch.")
            raise SidecarError(
                f"{path}: tensor '{name:.100}': expected {expected_dtype}, got {tensors[name].dtype}"
            )
    fisher = {
        site.output: {node: tensors[f"{site.output}.{node}"] for node in site.nodes()}
        for site in metadata.sites
    }
    return Sidecar(metadata, fisher, dict(zip(names, tensors["values"], strict=True)), str(path))
