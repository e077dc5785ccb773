"""What each process of a run tells the others of itself: that it lives, that it gets on, and how far it has come."""

import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from fisher_mask_mergekit.errors import ProcessError

FAILED = "failed"
"""The key under which the processes count those of them that failed."""

BEAT = 5.0
"""Seconds from one sign of life to the next."""

SILENCE = 300.0
"""Seconds without one after which a process is taken for dead."""

PATIENCE = 1800.0
"""Seconds without a batch after which a process that lives is taken to hang."""

_LOOK = 0.1


class _Told(NamedTuple):
    """Of one process: its signs of life, the batches that it measured, and the meetings that it came to."""

    beats: int
    batches: int
    met: int


class Pulse:
    """One process's word to the others, in a store that all of them reach; a thread gives its signs of life.

    Args:
        store: The store.
        rank: Which process this is.
        count: How many there are.
    """

    def __init__(self, store: dist.Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._beats = self._batches = self._met = 0
        self._telling, self._ended = threading.Lock(), threading.Event()
        self._tell()
        threading.Thread(target=self._beat, daemon=True).start()

    def count_batch(self) -> None:
        """One more was measured here."""
        self._batches += 1

    def meet(self, *, waits: bool = True) -> None:
        """Wait until every process has come as far as this, however long that takes while it gets on.

        Args:
            waits: Whether this one does; if not, it lets the others know that it has come, and goes on.

        Raises:
            ProcessError: If one failed, gives no sign of life for :data:`SILENCE`, or measures nothing for :data:`PATIENCE`.
            RuntimeError: Of torch, if the store cannot be reached.
        """
        self._met += 1
        self._tell()
        known: dict[Hashable, tuple[int, float]] = {}
        while waits and (
            late := {rank: told for rank, told in enumerate(self._all_told()) if told.met < self._met}
        ):
            if self._store.add(FAILED, 0):
                raise ProcessError("another process failed")
            now = time.monotonic()
            for rank, told in late.items():
                one = f"process {rank} of {self._count}"
                if now - _since(known, (rank, "beats"), told.beats, now) > SILENCE:
                    raise ProcessError(
                        f"{one} gives no sign of life for {SILENCE / 60:g} minutes: it was killed, or its machine cannot be "
                        "reached"
                    )
                if now - _since(known, (rank, "batches"), told.batches, now) > PATIENCE:
                    raise ProcessError(f"{one} hangs: it has measured nothing for {PATIENCE / 60:g} minutes")
            time.sleep(_LOOK)

    def end(self) -> None:
        """Give no more signs of life."""
        self._ended.set()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # Where there is no store any more, nobody listens.
            while not self._ended.wait(BEAT):
                self._beats += 1
                self._tell()

    def _tell(self) -> None:
        with self._telling:  # What is told last is what holds now.
            told = _Told(self._beats, self._batches, self._met)
            self._store.set(f"pulse/{self._rank}", " ".join(map(str, told)))

    def _all_told(self) -> list[_Told]:
        texts = self._store.multi_get([f"pulse/{rank}" for rank in range(self._count)])
        return [_Told(*map(int, text.split())) for text in texts]


def _since(known: dict[Hashable, tuple[int, float]], what: Hashable, value: int, now: float) -> float:
    """When something became what it is, as far as is known."""
    if what not in known or known[what][0] != value:
        known[what] = value, now
    return known[what][1]
