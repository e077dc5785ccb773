"""Merging block by block: the same numbers as at once, and nothing wide that is larger than a block."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from fisher_mask_mergekit import blocks
from fisher_mask_mergekit.blocks import Index
from fisher_mask_mergekit.parameter_merge import merge_elements
from fisher_mask_mergekit.weighting import Scheme, fisher_rows, merge_rows
from tests.test_weighting import sidecars

WEIGHTS = [1.0, 0.5, 2.0]
ROWS = {
    "a matrix by rows": ((7, 12), (7, 1)),
    "a matrix that is stored transposed": ((7, 12), (1, 12)),
    "one long row": ((1, 50), (1, 1)),
    "a vector": ((50,), (50,)),
    "experts": ((3, 6, 5), (3, 6, 1)),
    "experts that are stored transposed": ((3, 5, 6), (3, 1, 6)),
    "a scalar": ((), ()),
    "nothing": ((0, 4), (1, 1)),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_rows(tensors: list[Tensor], fishers: list[Tensor]) -> Tensor:
    return merge_rows(tensors, WEIGHTS, fishers)


def by_elements(tensors: list[Tensor], fishers: list[Tensor]) -> Tensor:
    wide = [fisher.expand(tensors[0].shape) for fisher in fishers]
    return merge_elements(tensors, WEIGHTS, WEIGHTS, lambda number, index: wide[number][index])


@pytest.mark.parametrize("limit", [1, 4, 5, 12, 13, 1000])
@pytest.mark.parametrize("shape", [shape for shape, _ in ROWS.values()])
def test_blocks_hold_every_element_once_and_no_more_than_they_may(shape: tuple[int, ...], limit: int) -> None:
    count = torch.zeros(shape)
    for index in blocks.blocks(shape, limit):
        assert count[index].numel() <= limit
        count[index] += 1
    assert_close(count, torch.ones(shape), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", [by_rows, by_elements])
@pytest.mark.parametrize("case", ROWS)
def test_blocks_change_no_bit(
    case: str, merge: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, rows = ROWS[case]
    tensors = [drawn(shape, seed, dtype) for seed in range(3)]
    fishers = [drawn(rows, seed).square().float() for seed in range(3)]
    if rows:
        for fisher in fishers:
            fisher[..., :1] = 0  # Rows that matter to no model.
    at_once = merge(tensors, fishers)
    monkeypatch.setattr(blocks, "CPU_BYTES", 5 * 8)
    assert_close(merge(tensors, fishers), at_once, rtol=0, atol=0)
    known = torch.stack(fishers).sum(0) != 0
    parts = [
        weight * torch.where(known, fisher, 1).double()
        for weight, fisher in zip(WEIGHTS, fishers, strict=True)
    ]
    wanted = sum(part * tensor.double() for part, tensor in zip(parts, tensors, strict=True)) / sum(parts)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if merge is by_elements else 0)
    assert_close(at_once.double(), wanted, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize(("family", "name"), [
    ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ("gpt2", "transformer.h.0.attn.c_attn.bias"),
    ("falcon-40b", "transformer.h.0.self_attention.query_key_value.weight"),
    ("llama-tied", "model.layers.0.self_attn.k_proj.weight"),
    ("mixtral", "model.layers.1.mlp.experts.gate_up_proj"),
])  # fmt: skip
def test_fused_grouped_transposed_and_expert_tensors(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = sidecars(family)
    found = [one.governed[name] for one in both]
    shape = found[0][1].shape
    fishers = fisher_rows(both, found, len(shape), Scheme())
    tensors = [drawn(shape, seed, torch.bfloat16) for seed in range(2)]
    at_once = merge_rows(tensors, WEIGHTS[:2], fishers)
    monkeypatch.setattr(blocks, "CPU_BYTES", 37 * 4)
    assert_close(merge_rows(tensors, WEIGHTS[:2], fishers), at_once, rtol=0, atol=0)


def allocations(run: Callable[[], Tensor]) -> list[int]:
    """Bytes of every tensor that torch makes, those inside its operators included, the largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = watched.profiler.kineto_results.events()
    return sorted((event.nbytes() for event in events if event.name() == "[memory]"), reverse=True)


@pytest.mark.parametrize(("dtype", "count"), itertools.product(DTYPES, [2, 8]))
def test_nothing_larger_than_a_block_is_made_but_the_result(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CPU_BYTES", 4096)
    tensors = [drawn((300, 40), seed, dtype) for seed in range(count)]
    rows = [torch.rand(300, 1) for _ in tensors]
    fishers = [torch.rand(300, 40) for _ in tensors]
    whole = tensors[0].nbytes

    def block(number: int, index: Index) -> Tensor:
        return fishers[number][index]

    ones = [1.0] * count
    for run in (
        lambda: merge_rows(tensors, ones),
        lambda: merge_rows(tensors, ones, [row.flatten()[:1, None] for row in rows]),
        lambda: merge_elements(tensors, ones, ones, block),
    ):
        made = allocations(run)
        assert made[0] == whole
        assert made[1] <= 4096
    # What is made for the shares of 300 rows does not grow with the columns.
    made = allocations(lambda: merge_rows(tensors, ones, rows))
    assert made[1] <= max(4096, count * 300 * 8)


def test_that_allocations_are_seen_inside_operators() -> None:
    wide, narrow = torch.zeros(1000), torch.ones(1000, dtype=torch.bfloat16)
    assert allocations(lambda: wide.addcmul_(narrow, wide))[0] == 4000
