"""Sums that are gone on from, added to others', and made means of."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fisher_mask_mergekit.diagonal import diagonal_fisher
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch
from tests import tiny
from tests.families import FAMILIES, build
from tests.test_architectures import TASK, batches

Measure = Callable[..., Any]


def mask(model: nn.Module, given: Iterable[Batch], **how: Any) -> Any:
    return mask_fisher(model, given, tiny.sites_of(model), tiny.TASK, **how)


def diagonal(model: nn.Module, given: Iterable[Batch], **how: Any) -> Any:
    return diagonal_fisher(model, given, tiny.TASK, **how)


def assert_equal(got: Any, wanted: Any) -> None:
    assert_close(got.fisher, wanted.fisher, rtol=0, atol=0)
    facts = ("samples", "loss", "accuracy", "one_by_one")
    assert [getattr(got, name) for name in facts] == [getattr(wanted, name) for name in facts]


def interrupted(measure: Measure, given: list[Batch], after: int) -> Any:
    """As a run that ended after so many batches, and another that began with what the first had summed."""
    kept: list[Tally[Any]] = []
    measure(given, on_batch=lambda batch, tally: kept.append(deepcopy(tally)))
    tally = kept[after - 1]
    assert tally.samples == sum(len(batch.index) for batch in given[:after])
    return measure(given[after:], tally=tally)


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "measure",
    [
        mask,
        partial(mask, labels="sampled", seed=3),
        partial(mask, labels="exact"),
        partial(mask, estimator="batch"),
        partial(mask, recompute=True),
        diagonal,
        partial(diagonal, labels="sampled", seed=3),
    ],
)
def test_a_run_goes_on_from_what_another_summed(measure: Measure, dtype: torch.dtype, after: int) -> None:
    model = tiny.classifier("bert").to(dtype)
    given = tiny.batches(tiny.samples(8), 2)
    assert_equal(interrupted(partial(measure, model), given, after), measure(model, given))


@pytest.mark.parametrize("after", [1, 2])
def test_so_does_one_whose_samples_turned_out_not_to_lie_apart(after: int) -> None:
    family = next(family for family in FAMILIES if family.name == "mpnet")
    model, given = build(family).double(), list(batches(family, (2, 2, 1)))
    measure = partial(diagonal_fisher, model, task=TASK)
    wanted = measure(given)
    assert wanted.one_by_one
    assert_equal(interrupted(measure, given, after), wanted)


@pytest.mark.parametrize("measure", [mask, partial(mask, estimator="batch"), diagonal])
def test_so_does_one_whose_batches_ran_in_halves(measure: Measure) -> None:
    model, given = tiny.classifier("bert"), tiny.batches([(torch.arange(5, 12), 0)] * 12, 4)
    lacking = True
    tried: list[int] = []

    def full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if lacking and len(args[0]) > 2:
            raise torch.OutOfMemoryError("no memory")

    model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(full)
    kept: list[Tally[Any]] = []
    wanted = measure(model, given, on_batch=lambda batch, tally: kept.append(deepcopy(tally)))
    lacking = False  # A larger machine must not round otherwise.
    tried.clear()
    assert_equal(measure(model, given[1:], tally=kept[0]), wanted)
    assert tried == [2, 2, 2, 2]


def added(one: Tally[Any], other: Tally[Any]) -> Tally[Any]:
    sums = dict(one.sums)
    for key, total in other.sums.items():
        sums[key] = sums[key] + total if key in sums else total
    return Tally(
        sums, one.samples + other.samples, one.loss + other.loss, one.correct + other.correct, one.one_by_one
    )


@pytest.mark.parametrize("measure", [mask, partial(mask, estimator="batch"), diagonal])
def test_sums_are_settled_before_they_are_means(measure: Measure) -> None:
    """As several processes do, one of which has no sample."""
    model = tiny.classifier("bert").double()
    given = tiny.batches(tiny.samples(8), 2)
    tallies: list[Tally[Any]] = []

    def keep(tally: Tally[Any]) -> Tally[Any]:
        tallies.append(deepcopy(tally))
        return tally

    for part in (given[:3], given[3:]):
        measure(model, part, settle=keep)
    got = measure(model, [], settle=lambda tally: added(added(tally, tallies[0]), tallies[1]))
    wanted = measure(model, given)
    assert_close(got.fisher, wanted.fisher, rtol=1e-12, atol=0)
    assert (got.samples, got.loss, got.accuracy) == (
        8,
        pytest.approx(wanted.loss, rel=1e-12),
        pytest.approx(wanted.accuracy),
    )
    with pytest.raises(MeasurementError, match="there is no sample"):
        measure(model, [])
