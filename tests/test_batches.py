"""What a batch may hold, in samples and in tokens."""

from itertools import islice

import pytest
import torch

from fisher_mask_mergekit.batches import FIRST_TOKENS, EncodedSamples, Limit, growing_limits, padded_batches
from fisher_mask_mergekit.tasks import Encoded
from tests import tiny

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


def test_a_gpus_batches_double_while_as_much_memory_is_free_as_was_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(islice(growing_limits(CPU, 7), 3)) == [Limit(FIRST_TOKENS, 7)] * 3
    used, cleared = iter([10, 30, 60, 30]), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: cleared.append("peak"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(used))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    got = [limit.tokens for limit in islice(growing_limits(torch.device("cuda"), None), 4)]
    assert got == [FIRST_TOKENS * factor for factor in (1, 2, 4, 4)]
    assert cleared == ["cache", "peak"]  # Once, of what an earlier model took.
