"""The processes of a run that a launcher started: they share the samples, add up what each summed, and end together."""

import gc
import io
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_mask_mergekit.errors import FisherMaskError, ProcessError, ToldError, first_line
from fisher_mask_mergekit.execution import own_device, pick_device
from fisher_mask_mergekit.pulse import FAILED, Pulse
from fisher_mask_mergekit.tally import Tally

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for what others have to give. One that was killed is noticed at once where its connections
close."""

_BLOCK = 2**24
"""Elements that are added up at a time."""


@dataclass(frozen=True)
class Processes:
    """All processes of a run, seen from one of them.

    Attributes:
        rank: Which one this is; the first, 0, alone reads and writes sidecars, and speaks.
        count: How many there are.
        pulse: What they tell each other of how far they are; None of one that is alone.
    """

    rank: int = 0
    count: int = 1
    pulse: Pulse | None = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def count_batch(self) -> None:
        """This one gets on."""
        if self.pulse:
            self.pulse.count_batch()

    def meet(self, *, waits: bool = True) -> None:
        """Wait until all have come as far as this, however far apart, as long as they get on.

        Args:
            waits: Whether this one does; if not, it lets the others know that it has come, and goes on.
        """
        if self.pulse:
            with _contact():
                self.pulse.meet(waits=waits)

    def told(self, value: T) -> T:
        """The first process's value."""
        values = [value]
        if self.count > 1:
            with _contact():
                dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with _contact():
                dist.all_gather_object(values, value)
        return values

    def anywhere(self, flag: bool) -> bool:
        """Whether something is so in any of them."""
        return any(self.gathered(flag))

    def agree(self, about: str, what: Mapping[str, str]) -> None:
        """Refuse to go on unless all processes have the same.

        Args:
            about: What it is of.
            what: By the name that a message gives it.

        Raises:
            ProcessError: If one has something else than the first (names the process).
        """
        (first_host, wanted), *others = self.gathered((_host(), dict(what)))
        for rank, (host, values) in enumerate(others, 1):
            for name in {**wanted, **values}:
                there, here = values.get(name, "none"), wanted.get(name, "none")
                if there != here:
                    raise ProcessError(
                        f"{about}: process {rank} on {host} has {name} {there:.60}, process 0 on {first_host} has {here:.60}. "
                        "All must read the same files, with the same versions and options"
                    )

    def added(self, tally: Tally[Any], device: torch.device) -> Tally[Any]:
        r"""What all processes summed, :math:`\sum_p s_p`, added in float64.

        Args:
            tally: What this one did; its sums are changed.
            device: Where this one's sums are.

        Returns:
            The same in every process, whatever each had: one without samples has no sums.
        """
        if self.count == 1:
            return tally
        self.meet()
        shapes: dict[Any, tuple[torch.Size, torch.dtype]] = {}
        for known in self.gathered({key: (total.shape, total.dtype) for key, total in tally.sums.items()}):
            shapes = known | shapes
        sums = {}
        for key, (shape, dtype) in shapes.items():
            total = tally.sums.pop(key, None)
            if total is None:
                total = torch.zeros(shape, dtype=dtype, device=device)
            sums[key] = _added(total)
        facts = self.gathered((tally.samples, tally.loss, tally.correct, tally.one_by_one))
        samples, losses, correct, one_by_one = zip(*facts, strict=True)
        return replace(
            tally,
            sums=sums,
            samples=sum(samples),
            loss=sum(losses),
            correct=sum(correct),
            one_by_one=any(one_by_one),
        )


ALONE = Processes()


def _added(total: Tensor) -> Tensor:
    """Over all processes, a block at a time: a parameter's sums in float64 would be twice as large."""
    flat = total.contiguous().view(-1)
    for part in flat.split(_BLOCK):
        wide = part.to(torch.float64)
        with _contact():
            dist.all_reduce(wide)
        part.copy_(wide)
    return flat.view(total.shape)


@contextmanager
def joined(device: str | None, place: int = 0, here: int = 1) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that a launcher started together with this one, and leave them at the end.

    All but the first are silent inside, but for what they write to ``sys.__stderr__``. Of an error, one process tells:
    whoever failed first.

    Args:
        device: As :func:`~fisher_mask_mergekit.execution.own_device` takes it.
        place: Which of the processes on its machine this is.
        here: How many of them there are on its machine.

    Yields:
        The processes, and where this one is to measure.

    Raises:
        FisherMaskError: What failed here.
        ToldError: If another process failed before.
    """
    with _contact():
        store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    with ExitStack() as stack:
        if rank > 0:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        own = dist.PrefixStore("fisher-mask-mergekit", store)
        with one_error(own, rank, count):
            where = own_device(device, place, here)
            with _contact():
                pulse = Pulse(own, rank, count)
            stack.callback(pulse.end)
            _join(where, store, rank, count)
            yield Processes(rank, count, pulse), where
            pulse.end()
            gc.collect()  # What belongs to the group must not outlive it.
            with suppress(RuntimeError):  # All is done.
                dist.barrier()
            dist.destroy_process_group()


def _join(device: torch.device, store: dist.Store, rank: int, count: int) -> None:
    from accelerate import PartialState

    is_cpu = device.type == "cpu"
    if not is_cpu:  # Before anything is put on the machine's first.
        torch.get_device_module(device).set_device(device)
        pick_device(str(device))
    backends = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
    with _contact():
        PartialState(
            cpu=is_cpu,
            backend=backends.get(device.type, "gloo"),
            store=store,
            rank=rank,
            world_size=count,
            timeout=PATIENCE,
        )


@contextmanager
def _contact() -> Iterator[None]:
    """Turn what torch says of processes that are gone into one error."""
    try:
        yield
    except RuntimeError as error:  # Of gloo, of NCCL, and of the store.
        raise _lost(error) from error


@contextmanager
def contact_within() -> Iterator[None]:
    """The same where a model runs, which may say other things, too.

    Raises:
        ProcessError: If processes are gone that have a part of it.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> ProcessError:
    reason = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[
        0
    ]  # Without where in gloo, and its advice.
    return ProcessError(
        f"no contact to the other processes: {reason}; one of them ended, its machine cannot be reached, or it is more than "
        f"{PATIENCE.total_seconds() / 60:g} minutes behind"
    )


@contextmanager
def one_error(store: dist.Store, rank: int, count: int) -> Iterator[None]:
    """Of the errors of all processes, leave the first as it is.

    Args:
        store: Which all of them reach.
        rank: Which of them this is.
        count: How many there are.

    Raises:
        ToldError: If another process was the first to fail.
    """
    try:
        yield
    except KeyboardInterrupt:
        if rank == 0:
            raise
        raise SystemExit(130) from None
    except FisherMaskError as error:
        with suppress(RuntimeError):  # Where nobody can be asked any more, everyone tells.
            if store.add(FAILED, 1) > 1:
                # A launcher ends all as soon as one ends: the one that tells first.
                time.sleep(1)
                raise ToldError(str(error)) from error
        if rank == 0:
            raise
        raise type(error)(f"process {rank} of {count}, on {_host()}: {error}") from error


def _host() -> str:
    return socket.gethostname()
