"""Intervals: their width against the closed form, how often they hold the truth, and what is paired."""

import math

import numpy
import pytest

from fisher_mask_mergekit.evaluation.bootstrap import RESAMPLES, Estimate, Resampled, bootstrap, resamples
from fisher_mask_mergekit.evaluation.metrics import METRICS
from fisher_mask_mergekit.evaluation.predictions import Predictions
from fisher_mask_mergekit.evaluation.scores import OWN, Results, TaskScores, score_task
from fisher_mask_mergekit.evaluation.table import markdown, record, verdict

BY_NAME = {metric.name: metric for metric in METRICS}


def predictions(right: numpy.ndarray) -> Predictions:
    count = len(right)
    reference = numpy.zeros(count, dtype=int)
    return Predictions(count, numpy.arange(count), 1 - right.astype(int), reference, 1.0 + ~right)


def task(name: str = "sst2", metric: str = "accuracy", **right: numpy.ndarray) -> TaskScores:
    lines = {OWN if line == "own" else line: predictions(rows) for line, rows in right.items()}
    return score_task(name, f"org/{name}", "data", (BY_NAME[metric],), lines, (0, 1))


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    right = numpy.random.default_rng(0).random(2000) < 0.8
    found = bootstrap({"it": BY_NAME["accuracy"].scorer(predictions(right))}, 2000, (0,))["it"]
    share = right.mean()
    error = math.sqrt(share * (1 - share) / 2000)
    assert found.value == share
    assert found.draws.shape == (RESAMPLES,)
    assert found.draws.std() == pytest.approx(error, rel=0.08)
    interval = found.estimate()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval.low < share < interval.high


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = numpy.random.default_rng(1)
    held = 0
    for repeat in range(200):
        right = draw.random(150) < 0.7
        found = bootstrap({"it": BY_NAME["accuracy"].scorer(predictions(right))}, 150, (repeat,))["it"]
        held += found.estimate().low <= 0.7 <= found.estimate().high
    assert 0.91 <= held / 200 <= 0.99


def test_the_same_seed_draws_the_same_and_every_row_once_on_average() -> None:
    first, second = (numpy.concatenate(list(resamples(5000, (3, 4)))) for _ in range(2))
    numpy.testing.assert_array_equal(first, second)
    assert (first.sum(1) == 5000).all()
    assert first.mean(0) == pytest.approx(1, abs=0.2)
    other = next(resamples(5000, (3, 5)))
    assert (other != first[: len(other)]).any()


def test_a_difference_is_paired() -> None:
    draw = numpy.random.default_rng(2)
    own = draw.random(1000) < 0.9
    one = draw.random(1000) < 0.7
    # Another on ten rows only: apart, the intervals overlap; on the same rows, the gain is clear.
    better = one.copy()
    better[numpy.flatnonzero(~one)[:10]] = True
    found = Results([task(own=own, one=one, better=better)], ["one", "better"])
    apart = [found.tasks[0].scores[line]["accuracy"].estimate() for line in found.merges]
    assert apart[0].high > apart[1].low
    gain = found.difference("better", "one", found.tasks[0])
    changed = (better.astype(float) - one).std() / math.sqrt(1000)
    assert gain.value == pytest.approx(0.01)
    assert gain.draws.std() == pytest.approx(changed, rel=0.1)
    assert verdict(gain) == "better"
    assert verdict(found.difference("one", "better", found.tasks[0])) == "worse"
    same = Results([task(own=own, one=one, two=one)], ["one", "two"])
    assert same.difference("two", "one").estimate() == Estimate(0, 0, 0)
    assert verdict(same.difference("two", "one")) == "a tie"


def test_noise_is_a_tie() -> None:
    draw = numpy.random.default_rng(3)
    own, one, two = (draw.random(500) < share for share in (0.9, 0.75, 0.75))
    found = Results([task(own=own, one=one, two=two)], ["one", "two"])
    assert verdict(found.difference("two", "one")) == "a tie"
    assert markdown(found).count("a tie") == 2


def test_normalised_mean_and_median() -> None:
    rows = {share: numpy.arange(100) < 100 * share for share in (0.2, 0.4, 0.5, 0.8)}
    tasks = [
        task("a", own=rows[0.8], m=rows[0.4]),
        task("b", own=rows[0.5], m=rows[0.4]),
        task("c", own=rows[0.8], m=rows[0.2]),
    ]
    found = Results(tasks, ["m"])
    assert [one.normalised("m").value for one in tasks] == pytest.approx([50, 80, 25])
    assert found.over_tasks("mean", "m").value == pytest.approx(155 / 3)
    assert found.over_tasks("median", "m").value == pytest.approx(50)
    assert found.over_tasks("mean", OWN, normalised=False).value == pytest.approx(0.7)
    written = record(found)
    assert written["mean"]["normalised"]["m"]["value"] == pytest.approx(155 / 3)
    assert written["tasks"][1]["scores"]["accuracy"][OWN]["value"] == 0.5
    assert written["differences"] == []


def test_where_less_is_better_the_ratio_is_turned_over() -> None:
    own, merged = numpy.ones(10, dtype=bool), numpy.zeros(10, dtype=bool)
    found = task(metric="loss", own=own, m=merged)
    assert (found.first(OWN).value, found.first("m").value) == (1.0, 2.0)
    assert found.normalised("m").value == 50
    text = markdown(Results([found], ["m"]))
    assert "Less loss is better: normalised is fine-tuned / merged x 100" in text
    worse = Results([task(metric="loss", own=own, m=own, n=merged)], ["m", "n"])
    assert "worse" in markdown(worse)


def test_a_score_of_zero_has_no_ratio() -> None:
    nothing, some = numpy.zeros(10, dtype=bool), numpy.arange(10) < 5
    found = Results([task(own=nothing, m=some)], ["m"])
    assert math.isnan(found.tasks[0].normalised("m").value)
    assert "n/a" in markdown(found)
    assert "has no ratio" in markdown(found)
    assert record(found)["tasks"][0]["normalised"]["m"] == {"value": None, "low": None, "high": None}


def test_means_of_unlike_metrics_are_not_given() -> None:
    rows = numpy.arange(10) < 5
    found = Results(
        [task("a", own=rows, m=rows), task("b", metric="f1_macro", own=rows, m=rows)], ["m"]
    )  # fmt: skip
    assert record(found)["mean"]["scores"] is None
    assert record(found)["mean"]["normalised"]["m"]["value"] == 100


def test_a_number_that_is_never_defined_has_no_interval() -> None:
    never = Resampled(0.5, numpy.full(RESAMPLES, numpy.nan)).estimate()
    assert math.isnan(never.low)
    assert math.isnan(never.high)
