"""What sidecars say of a checkpoint's parameters, and which of them a merge's tensor is."""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fisher_mask_mergekit.checkpoint import modern
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.recognition import VALUES_PER_TENSOR, Recognition
from fisher_mask_mergekit.sidecar import Measurement, Record
from fisher_mask_mergekit.sites import Count, Name
from fisher_mask_mergekit.untrusted import MOST_AXES, MOST_COUNT


class _Known(Record):
    model_config = ConfigDict(ser_json_inf_nan="strings")

    shape: tuple[Count, ...] = Field(max_length=MOST_AXES)
    values: tuple[float, ...] = Field(max_length=VALUES_PER_TENSOR)


class ParameterRecord(_Known):
    """One parameter.

    Attributes:
        names: First that in the loaded model, under which its numbers are kept; then others that it has there or in
            the checkpoint's files.
        shape: Its shape.
        values: Some of the parameter's values, see :func:`~fisher_mask_mergekit.recognition.probe`.
    """

    names: tuple[Name, ...] = Field(min_length=1)


class ViewRecord(_Known):
    """A tensor of the checkpoint's files that is a piece of a parameter, or a parameter transposed.

    Attributes:
        name: The tensor's.
        source: The parameter's first name.
        shape: The tensor's.
        offset: Where in the parameter its first element is, in row-major order.
        strides: How far apart in the parameter its neighbours along each axis are.
        values: Some of the tensor's values.
    """

    name: Name
    source: Name
    offset: Count
    strides: tuple[Count, ...] = Field(max_length=MOST_AXES)


class ParameterMetadata(Measurement):
    """Everything about a measurement of all parameters but its numbers.

    Attributes:
        mean: Over all parameters.
        others: Tensors of the checkpoint's files that are no parameters: a merge averages them.
        tensors: The parameters.
        views: Other shapes that they have in the checkpoint's files.
    """

    mean: float = Field(ge=0, allow_inf_nan=False)
    others: tuple[Name, ...]
    tensors: tuple[ParameterRecord, ...] = Field(min_length=1)
    views: tuple[ViewRecord, ...]


def check_records(metadata: ParameterMetadata, where: str) -> None:
    """Refuse records that contradict each other.

    Raises:
        SidecarError: If a name is there twice, a view reaches beyond its parameter, or has more elements than any tensor.
    """
    names = [name for record in metadata.tensors for name in record.names]
    names += [view.name for view in metadata.views]
    if len(set(names)) != len(names):
        raise SidecarError(f"{where} names a tensor twice")
    sizes = {record.names[0]: math.prod(record.shape) for record in metadata.tensors}
    for view in metadata.views:
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=False))
        if len(view.shape) != len(view.strides) or 0 in view.shape or last >= sizes.get(view.source, 0):
            raise SidecarError(f"{where} takes '{view.name:.100}' from beyond '{view.source:.100}'")
        if math.prod(view.shape) > MOST_COUNT:  # By strides of 0.
            raise SidecarError(f"{where}: '{view.name:.100}' has more than {MOST_COUNT:,} elements")


class ParameterSidecar(ABC):
    """A sidecar of all parameters: it knows them by their values, and gives blocks of their Fisher information."""

    metadata: ParameterMetadata

    @property
    @abstractmethod
    def source(self) -> str:
        """Where it was read from, for messages."""

    @abstractmethod
    def mean_of(self, record: "AnyRecord") -> float:
        """Mean over all of a parameter's elements; of a piece of one too, over the whole."""

    @cached_property
    def records(self) -> dict[str, "AnyRecord"]:
        """By every name."""
        views: dict[str, AnyRecord] = {record.name: record for record in self.metadata.views}
        return views | {name: record for record in self.metadata.tensors for name in record.names}

    @cached_property
    def _recognition(self) -> Recognition:
        known = {
            name: (record.shape, torch.tensor(record.values, dtype=torch.float64, device="cpu"))
            for name, record in self.records.items()
        }
        return Recognition(known, self._about)

    @property
    def _about(self) -> str:
        return f"sidecar '{self.source}' was measured on {self.metadata.described_checkpoint}"

    def identify(self, name: str, tensor: Tensor) -> "AnyRecord | None":
        """Which of the checkpoint's parameters this is, told by its values.

        Args:
            name: The name it goes by; where a merge moves layers, another layer's.
            tensor: The tensor, in any floating-point dtype and on any device.

        Returns:
            Its record; None if it is no parameter.

        Raises:
            SidecarMismatchError: If the values are not this checkpoint's, or fit several layers; or if it knows
                no tensor of such a name.
        """
        known = modern(name)
        found = self._recognition.which(known, tensor)
        if found is not None:
            return self.records[found]
        if {name, known} & set(self.metadata.others):
            return None
        raise SidecarMismatchError(f"{self._about}: it knows no tensor '{name}'")

    def whole(self, record: "AnyRecord") -> ParameterRecord:
        """The parameter that a record is of, or of a piece of."""
        found = record if isinstance(record, ParameterRecord) else self.records[record.source]
        assert isinstance(found, ParameterRecord)
        return found


AnyRecord = ParameterRecord | ViewRecord
