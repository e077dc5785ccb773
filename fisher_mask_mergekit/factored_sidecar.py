"""The sidecar of the Fisher information of all parameters by rows and columns: one small file.

The format is described in ``docs/sidecar.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fisher_mask_mergekit.blocks import Index
from fisher_mask_mergekit.errors import SidecarError
from fisher_mask_mergekit.factors import Factors, Split, factors_of, piece
from fisher_mask_mergekit.parameter_records import (
    AnyRecord,
    ParameterMetadata,
    ParameterRecord,
    ParameterSidecar,
    ViewRecord,
    check_records,
)
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.sidecar import FACTORED_KEY, metadata_text, parse
from fisher_mask_mergekit.sites import Count
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.untrusted import (
    MOST_AXES,
    MOST_SIDECAR_BYTES,
    read_header,
    read_regular,
)


class FactoredRecord(ParameterRecord):
    """One parameter's rows and columns.

    Attributes:
        axis: That its rows lie along: what is before it are matrices of their own, what is after it are columns.
    """

    axis: Count = Field(lt=MOST_AXES)

    @property
    def split(self) -> Split:
        """How its elements fall into matrices."""
        return Split.of(self.shape, self.axis)


class FactoredMetadata(ParameterMetadata):
    """Everything about a measurement but its numbers.

    Attributes:
        tensors: The parameters.
    """

    tensors: tuple[FactoredRecord, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class FactoredSidecar(ParameterSidecar):
    """One checkpoint's Fisher information by rows and columns.

    Attributes:
        metadata: What was measured and how.
        packed: Per parameter, by its first name, the means of its rows and columns, float32, see
            :class:`~fisher_mask_mergekit.factors.Split`.
        source: Where it was read from, for messages.
    """

    metadata: FactoredMetadata
    packed: Mapping[str, Tensor]
    source: str = ""
    _factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def whole(self, record: AnyRecord) -> FactoredRecord:
        """The parameter that a record is of, or of a piece of."""
        found = super().whole(record)
        assert isinstance(found, FactoredRecord)
        return found

    def mean_of(self, record: AnyRecord) -> float:
        """Mean over all of a parameter's elements; of a piece of one too, over the whole."""
        whole = self.whole(record)
        return float(self.packed[whole.names[0]][:, : whole.split.rows].double().mean())

    def factors(self, record: AnyRecord) -> Factors:
        """Those of a parameter's Fisher information, or of a piece of it; float64, on the CPU."""
        whole = self.whole(record)
        shape, offset, strides = record.shape, 0, _row_major(record.shape)
        if isinstance(record, ViewRecord):
            offset, strides = record.offset, record.strides
        key = whole.names[0]
        if key not in self._factors:  # Experts have many pieces.
            self._factors[key] = factors_of(self.packed[key], whole.split)
        found = piece(self._factors[key], whole.split, shape, offset, strides)
        if found is None:
            raise SidecarError(
                f"{self.source}: a piece of '{key}' {list(record.shape)} is no product of its rows and columns"
            )
        return found

    def fisher(self, record: AnyRecord, index: Index = ()) -> Tensor:
        """A tensor's Fisher information, or a block of it; float64, on the CPU."""
        return self.factors(record).block(index)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie one after the other."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def write_factored(sidecar: FactoredSidecar, path: Path) -> None:
    """Write a sidecar under a temporary name, then rename it: there is a whole file or none.

    Raises:
        SidecarError: If it cannot be written; whatever was at ``path`` is untouched.
    """
    tensors = {name: tensor.contiguous() for name, tensor in sidecar.packed.items()}
    content = save(tensors, {FACTORED_KEY: seal(sidecar.metadata.model_dump_json(), tensors)})
    try:
        write_whole(path, content)
    except OSError as error:
        raise SidecarError(f"cannot write {path}: {error.strerror or error}; nothing was written") from error


def is_factored(path: Path) -> bool:
    """Whether a file says that it is such a sidecar."""
    if not path.is_file():  # A pipe would be waited for.
        return False
    try:
        with path.open("rb") as file:
            return f'"{FACTORED_KEY}"'.encode() in read_header(file, path)
    except (OSError, ValueError, SidecarError):
        return False


def read_factored(path: Path) -> FactoredSidecar:
    """Read and check a sidecar. It is not trusted: nothing in it is executed or used as a path.

    Raises:
        SidecarError: If it is not a whole, consistent sidecar of a format this version knows.
    """
    content = read_regular(path, MOST_SIDECAR_BYTES, "sidecar", SidecarError)
    header, what = read_header(BytesIO(content), path), "sidecar of rows and columns (nodes: all)"
    text = metadata_text(header, path, FACTORED_KEY, what)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SidecarError(f"{path} is not a whole safetensors file: {error}") from error
    metadata = parse(FactoredMetadata, text, tensors, path)
    check_records(metadata, str(path))
    sidecar = FactoredSidecar(metadata, tensors, str(path))
    _check_tensors(sidecar)
    for view in metadata.views:
        sidecar.factors(view)
    return sidecar


def _check_tensors(sidecar: FactoredSidecar) -> None:
    path, expected = sidecar.source, {}
    for record in sidecar.metadata.tensors:
        if record.axis >= max(1, len(record.shape)):
            raise SidecarError(
                f"{path}: '{record.names[0]:.100}' {list(record.shape)} has no axis {record.axis}"
            )
        expected[record.names[0]] = record.split.packed
    for name in expected.keys() | sidecar.packed.keys():
        tensor = sidecar.packed.get(name)
        got = "no such tensor" if tensor is None else tuple(tensor.shape)
        if got != (want := expected.get(name, "no such tensor")):
            raise SidecarError(f"{path}: tensor '{name:.100}': expected {want}, got {got}")
        assert tensor is not None
        if tensor.dtype != torch.float32:
            raise SidecarError(f"{path}: tensor '{name:.100}': expected float32, got {tensor.dtype}")
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise SidecarError(f"{path}: {name:.100} has values that are negative or not finite")
