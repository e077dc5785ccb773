"""Processes that wait for each other: as long as one that works takes, and no longer for one that does not."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from fisher_mask_mergekit import pulse
from fisher_mask_mergekit.errors import ProcessError
from fisher_mask_mergekit.pulse import Pulse


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pulse]]:
    monkeypatch.setattr(pulse, "BEAT", 0.05)
    store = dist.HashStore()
    both = [Pulse(store, rank, 2) for rank in range(2)]
    yield both
    for one in both:
        one.end()


def test_one_that_gets_on_is_waited_for_however_long(
    two: list[Pulse], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "PATIENCE", 2.0)

    def work() -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            time.sleep(0.05)
            two[1].count_batch()
        two[1].meet()

    thread = threading.Thread(target=work)
    thread.start()
    two[0].meet()
    thread.join()
    # The first meeting is not taken for the second.
    with pytest.raises(ProcessError, match="process 1 of 2 hangs: it has measured nothing for "):
        two[0].meet()


def test_one_that_lives_and_measures_nothing_hangs(two: list[Pulse], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "PATIENCE", 0.5)
    two[1].count_batch()
    with pytest.raises(ProcessError, match="process 1 of 2 hangs: it has measured nothing for "):
        two[0].meet()


def test_one_that_gives_no_sign_of_life_is_dead(two: list[Pulse], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENCE", 0.5)
    two[1].end()
    with pytest.raises(ProcessError, match="process 1 of 2 gives no sign of life for"):
        two[0].meet()


def test_nobody_waits_for_one_that_failed(two: list[Pulse]) -> None:
    two[1]._store.add(pulse.FAILED, 1)
    with pytest.raises(ProcessError, match="another process failed"):
        two[0].meet()


def test_who_does_not_wait_is_waited_for(two: list[Pulse]) -> None:
    two[0].meet(waits=False)
    two[1].meet()
