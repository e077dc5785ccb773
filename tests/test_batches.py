"""What a batch may hold, in samples and in tokens."""

import os
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit import batches as batches_module
from fisher_mask_mergekit import encoding
from fisher_mask_mergekit.batches import FIRST_TOKENS, Limit, _ahead, _batch, growing_limits, padded_batches
from fisher_mask_mergekit.data import Samples
from fisher_mask_mergekit.encoding import EncodedSamples, encode_samples
from fisher_mask_mergekit.errors import CheckpointError, DataError
from fisher_mask_mergekit.tasks import Batch, CausalLM, Encoded, Tokenization
from fisher_mask_mergekit.tasks.sequences import Regression
from tests import tiny
from tests.test_encoding import decoder

CPU = torch.device("cpu")


def indices(
    lengths: list[int], limit: Limit, *, by_length: bool = True, choices: int = 0
) -> list[tuple[int, ...]]:
    def sample(length: int) -> Encoded:
        ids = [5] * length
        inputs = {"input_ids": [ids] * choices if choices else ids}
        return Encoded(inputs, 0, truncated=False)

    encoded = EncodedSamples({index: sample(length) for index, length in enumerate(lengths)}, 0, 0)
    made = padded_batches(encoded, tiny.tokenizer(), limits=limit, by_length=by_length, device=CPU)
    return [batch.index for batch in made]


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (Limit(), [(1, 3, 0, 2, 4)]),
        (Limit(rows=2), [(1, 3), (0, 2), (4,)]),
        (Limit(tokens=8), [(1,), (3,), (0, 2), (4,)]),
        (Limit(tokens=12), [(1,), (3, 0), (2, 4)]),
        (Limit(tokens=1), [(1,), (3,), (0,), (2,), (4,)]),
        (Limit(tokens=12, rows=1), [(1,), (3,), (0,), (2,), (4,)]),
    ],
)
def test_limits_in_tokens_count_padding_and_a_longer_sample_is_alone(
    limit: Limit, wanted: list[tuple[int, ...]]
) -> None:
    assert indices([4, 9, 4, 5, 4], limit) == wanted


def test_in_the_order_drawn_the_longest_so_far_counts() -> None:
    assert indices([2, 5, 1, 1], Limit(tokens=10), by_length=False) == [(0, 1), (2, 3)]
    assert indices([1, 1, 5, 1], Limit(tokens=10), by_length=False) == [(0, 1), (2, 3)]


def test_a_choice_among_several_is_as_long_as_all_of_them() -> None:
    assert indices([3, 3, 3], Limit(tokens=12), choices=2) == [(0, 1), (2,)]


def test_a_text_and_its_target_are_as_long_as_the_longer() -> None:
    samples = {
        index: Encoded({"input_ids": [5] * 2}, [6] * length, truncated=False)
        for index, length in enumerate((3, 9, 1))
    }
    made = padded_batches(
        EncodedSamples(samples, 0, 0), tiny.tokenizer(), limits=Limit(tokens=10), by_length=True, device=CPU
    )
    found = list(made)
    assert [batch.index for batch in found] == [(1,), (0, 2)]
    assert [batch.size for batch in found] == [9, 6]


def test_a_gpus_batches_double_every_other_time_while_as_much_memory_is_free_as_was_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(islice(growing_limits(CPU, 7), 5)) == [Limit(FIRST_TOKENS, 7)] * 5
    used, cleared = iter([10, 30, 60, 30]), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: cleared.append("peak"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(used))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    got = [limit.tokens for limit in islice(growing_limits(torch.device("cuda"), None), 8)]
    assert got == [FIRST_TOKENS * factor for factor in (1, 1, 2, 2, 4, 4, 4, 4)]
    assert cleared == ["cache", "peak"]  # Once, of what an earlier model took.


def encoded(*lengths: int) -> EncodedSamples:
    samples = {
        index: Encoded({"input_ids": [5 + index] * length}, index, truncated=False)
        for index, length in enumerate(lengths)
    }
    return EncodedSamples(samples, 0, 0)


def test_off_the_cpu_one_batch_is_made_in_advance_by_a_thread_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned_by, made_by = [], []

    def limits() -> Iterator[Limit]:
        while True:
            planned_by.append(threading.current_thread().name)
            yield Limit(rows=2)

    def noted(*args: Any) -> Batch:
        made_by.append(threading.current_thread().name)
        return _batch(*args)

    drawn, how = encoded(4, 9, 4, 5, 4, 2, 1, 1), {"tokenizer": tiny.tokenizer(), "by_length": True}
    wanted = list(padded_batches(drawn, limits=Limit(rows=2), device=CPU, **how))
    monkeypatch.setattr(batches_module, "_batch", noted)
    # The meta device has no memory, but is none of the CPU's.
    batches = padded_batches(drawn, limits=limits(), device=torch.device("meta"), **how)
    assert planned_by == []
    for taken, batch in enumerate(wanted, 1):
        other = next(batches)
        assert other.index == batch.index
        assert_close(other.inputs["input_ids"], batch.inputs["input_ids"].to("meta"))
        assert planned_by == [threading.current_thread().name] * min(taken + 1, len(wanted))
    assert next(batches, None) is None
    assert made_by == ["batches_0"] * len(wanted)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_a_batch_is_made_while_the_one_before_it_runs() -> None:
    made = threading.Event()

    def make(plan: list[int]) -> Any:
        if plan == [1]:
            made.set()
        return plan

    batches = _ahead(make, iter([[0], [1], [2]]), CPU)
    assert next(batches) == [0]
    assert made.wait(60)
    assert list(batches) == [[1], [2]]


def test_what_goes_wrong_in_advance_is_told_in_its_turn_and_nothing_is_left_running() -> None:
    def make(plan: list[int]) -> Any:
        if plan == [1]:
            raise CheckpointError("the tokenizer gives what cannot be padded")
        return plan

    batches = _ahead(make, iter([[0], [1], [2]]), CPU)
    assert next(batches) == [0]
    with pytest.raises(CheckpointError, match="what cannot be padded"):
        next(batches)
    abandoned = _ahead(make, iter([[0], [2], [3]]), CPU)
    next(abandoned)
    del abandoned
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


RECORD: Any = None


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SAMPLES_PER_PROCESS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_many_samples_are_tokenised_by_several_processes_as_one_would(
    two_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A causal LM leaves out what has no second token; a regression's labels are lists of floats.
    texts = [("w5 w6 w7",), ("",), ("w8",), ("w9 w5",), ("w6 w7 w8 w9 w6",)]
    how = decoder(4)
    for task, labels in ((CausalLM(), [None] * 5), (Regression(), [[0.1], [2.0], [1e-9], [-1.0], [3.5]])):
        samples = Samples(texts, labels, RECORD)
        got = encode_samples(samples, task, how)
        with monkeypatch.context() as one:
            one.setattr(torch, "get_num_threads", lambda: 1)
            one.setattr(encoding.datasets.Dataset, "map", None)
            assert encode_samples(samples, task, how) == got
        assert got.left_out == (1 if isinstance(task, CausalLM) else 0)


class _Refusing(CausalLM):
    def encode(self, text: Any, label: Any, index: int, how: Tokenization) -> Any:
        if text == ("bad",):
            raise DataError("sample 3 cannot be read")
        if text == ("deadly",):
            os._exit(1)
        return super().encode(text, label, index, how)


@pytest.mark.parametrize(
    ("text", "message"), [("bad", "sample 3 cannot be read"), ("deadly", "could not be tokenised: .*died")]
)
def test_what_goes_wrong_in_a_process_is_an_error(two_processes: None, text: str, message: str) -> None:
    samples = Samples([("w5 w6",)] * 3 + [(text,)] * 2, [None] * 5, RECORD)
    with pytest.raises(DataError, match=message):
        encode_samples(samples, _Refusing(), Tokenization(tiny.tokenizer(), 4))
