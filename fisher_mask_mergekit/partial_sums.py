"""Partial sums: what a measurement that was interrupted goes on from.

They lie in one safetensors file beside the sidecar's place, ``.NAME.partial``, or in one for each of several processes,
``.NAME.partial-RANK-of-COUNT``, described in ``docs/sidecar.md``.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisher_mask_mergekit.errors import SidecarError, first_line
from fisher_mask_mergekit.processes import ALONE, Processes
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.shown import one_line
from fisher_mask_mergekit.sidecar import METADATA_KEY, Record, check_version, parse
from fisher_mask_mergekit.sites import Count
from fisher_mask_mergekit.store import clear_half_written, partial_path, partials, remove_partials, whole_file
from fisher_mask_mergekit.tally import Key, Tally
from fisher_mask_mergekit.untrusted import read_header, read_json

FORMAT_VERSION: Literal[1] = 1
EVERY = 60.0
"""Seconds from one writing to the next."""

_MOST_NAMED = 5
"""Of the differences that a message tells."""

_SHARE_OF_TIME = 1 / 20
"""That writing may take at most: full-size sums are as large as the model, and take longer than mask nodes' do."""


class PartialMetadata(Record):
    """What partial sums are of.

    Attributes:
        format_version: Of this file format.
        request: All that the numbers depend on, to their last bit, by what it is called.
        samples: How many samples are in the sums: the first of the order that batches have them in.
        total: How many are to be.
        loss: As in a :class:`~fisher_mask_mergekit.tally.Tally`, and so those below.
        correct: None where nothing can be right.
    """

    format_version: Literal[1]
    request: dict[str, Any]
    samples: Count = Field(ge=1)
    total: Count
    loss: float = Field(allow_inf_nan=False)
    correct: float | None = Field(allow_inf_nan=False)
    one_by_one: bool
    checked: Count
    checked_padded: bool
    too_large: Count | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples > self.total:
            raise ValueError("expected no more samples than there are to be")
        return self


@dataclass
class PartialSums(Generic[Key]):
    """Where a measurement's sums are kept while it runs; of several processes, what one of them summed.

    Attributes:
        target: The sidecar's place.
        find_request: Says what the numbers depend on. Asked only if there is something to be compared or written.
        keys: The sums' keys by the names that they have in the file.
        total: How many samples there are, of this process.
        every: Seconds from one writing to the next, at least; more where writing takes long. 0: nothing is written, nor
            gone on from.
        say: Tells the user something.
        processes: The run's.
    """

    target: Path
    find_request: Callable[[], Mapping[str, Any]]
    keys: Mapping[str, Key]
    total: int
    every: float
    say: Callable[[str], None]
    processes: Processes = ALONE
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = time.monotonic() + self.every if self.every else math.inf

    @property
    def path(self) -> Path:
        """The file."""
        return partial_path(self.target, self.processes.rank, self.processes.count)

    @cached_property
    def request(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            "processes": self.processes.count,
            "process": self.processes.rank,
            **self.find_request(),
        }

    def begin(self, most: int, *, anew: bool) -> Tally[Key] | None:
        """What an interrupted run of the same request left; None if there is nothing to go on from.

        What is damaged is told of and left out of account: there is nothing in it that could be saved.

        Args:
            most: Bytes that the file may have.
            anew: Whether to leave it out of account, whatever it is.

        Raises:
            SidecarError: If it is of another request, or of another number of processes (names what differs).
        """
        clear_half_written(self.path)
        path = self._left()
        if not self.every or path is None:
            return None
        if anew:
            self.say(
                f"beginning anew: --force; what an interrupted run summed ({path}) is left out of account"
            )
            return None
        try:
            metadata, found = _read(path, most)
        except SidecarError as error:
            self.say(f"the sums of an interrupted run cannot be used, so this one begins anew: {error}")
            return None
        self._check_request(metadata, path)
        fields = metadata.model_dump(include=_TALLIED)
        correct = math.nan if metadata.correct is None else metadata.correct
        # A name that nothing has is refused with what does not fit the model.
        sums: dict[Any, Tensor] = {self.keys.get(name, name): total for name, total in found.items()}
        return Tally(sums, correct=correct, **fields)

    def _left(self) -> Path | None:
        """This process's own, else what a run in another number of processes left."""
        if self.path.is_file():
            return self.path
        others = (path for path, count in partials(self.target).items() if count != self.processes.count)
        return next(others, None)

    def _check_request(self, metadata: PartialMetadata, path: Path) -> None:
        if other := self._differences(metadata):
            more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
            raise SidecarError(
                f"an interrupted run left sums over {metadata.samples} of {metadata.total} samples that do not go with "
                f"this one's: {'; '.join(other[:_MOST_NAMED])}{more}. Run its command again to go on with it, or begin anew, with --force "
                f"or by deleting them:  {path}"
            )

    def _differences(self, metadata: PartialMetadata) -> list[str]:
        """What is other than it was: what a user sets, or what follows from it only if that is all."""
        then, now = metadata.request, self.request
        names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
        if "processes" in names:  # Then shares are others, too.
            names = [name for name in names if name != "process"]
        if told := [name for name in names if not (_is_digest(then.get(name)) or _is_digest(now.get(name)))]:
            names = told
        other = [f"{_shown(name)} {_shown(then.get(name))}, now {_shown(now.get(name))}" for name in names]
        if not other and metadata.total != self.total:
            other.append(f"{metadata.total} samples with something to predict, now {self.total}")
        return other

    def keep(self, tally: Tally[Key], check: Callable[[], None]) -> None:
        """Write what was summed so far, if it is time.

        Args:
            tally: It.
            check: Raises an error if what is measured has changed.
        """
        if time.monotonic() < self._next:
            return
        request = (
            self.request
        )  # First the digests of the files, then whether these are still what was loaded.
        check()
        metadata = PartialMetadata(
            format_version=FORMAT_VERSION,
            request=request,
            total=self.total,
            correct=None if math.isnan(tally.correct) else tally.correct,
            **{name: getattr(tally, name) for name in _TALLIED},
        )
        started = time.monotonic()
        try:
            self._write(metadata, tally)
        except OSError as error:
            self._next = math.inf
            self.say(
                f"cannot write {self.path}: {error.strerror or error}; measuring goes on, and begins anew if it is interrupted"
            )
            return
        ended = time.monotonic()
        remove_partials(
            self.target, but=self.processes.count
        )  # Of runs that this one was to leave out of account.
        self._next = ended + max(self.every, (ended - started) / _SHARE_OF_TIME)

    def remove(self) -> None:
        """There is nothing left to go on with, of any process that this one sees."""
        remove_partials(self.target)

    def _write(self, metadata: PartialMetadata, tally: Tally[Key]) -> None:
        names = {key: name for name, key in self.keys.items()}
        sums = {names[key]: total.detach().cpu().contiguous() for key, total in tally.sums.items()}
        try:
            with whole_file(self.path) as temporary:
                save_file(sums, temporary, {METADATA_KEY: seal(metadata.model_dump_json(), sums)})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error


_TALLIED = {"samples", "loss", "one_by_one", "checked", "checked_padded", "too_large"}


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _shown(value: Any) -> str:
    """A digest is known by its beginning."""
    text = "none" if value is None else one_line(str(value))
    return f"{text:.12}" if _is_digest(value) else f"{text:.80}"


def _read(path: Path, most: int) -> tuple[PartialMetadata, dict[str, Tensor]]:
    """Read and check partial sums. They are not trusted: nothing in them is executed or used as a path.

    Raises:
        SidecarError: If they are not whole, or not of a format that this version knows.
    """
    try:
        if path.stat().st_size > most:
            raise SidecarError(f"{path} is larger than {most} bytes")
        with path.open("rb") as file:
            text = read_json(read_header(file, path).decode(), path)["__metadata__"][METADATA_KEY]
        version = read_json(text, path)["format_version"]
        check_version(path, version, FORMAT_VERSION)
        with safe_open(path, framework="pt") as tensors:
            sums = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (
        OSError,
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise SidecarError(f"{path} holds no partial sums: {first_line(error)}") from error
    metadata = parse(PartialMetadata, text, sums, path)
    for name, total in sums.items():
        if total.dtype not in (torch.float32, torch.float64) or not bool(
            (total.isfinite() & (total >= 0)).all()
        ):
            raise SidecarError(
                f"{path}: {name:.100} has values that are negative, not finite, or {total.dtype}"
            )
    return metadata, {name: total.clone() for name, total in sums.items()}
