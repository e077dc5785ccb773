"""Metrics: the figures that their libraries' own documentation gives, and the same on resamples."""

import json
import math
from typing import Any

import numpy
import pytest
from numpy.testing import assert_allclose

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.evaluation.answers import exact, overlap
from fisher_mask_mergekit.evaluation.metrics import DEFAULTS, METRICS, metrics_of
from fisher_mask_mergekit.evaluation.predictions import Predictions
from fisher_mask_mergekit.tasks import (
    CausalLM,
    MultiLabelClassification,
    Regression,
    SequenceClassification,
)

BY_NAME = {metric.name: metric for metric in METRICS}
NAMES = {"a": 0, "b": 1}


def given(reference: Any, predicted: Any, nll: Any = (), owner: Any = None, count: int = 0) -> Predictions:
    wanted, said = numpy.array(reference), numpy.array(predicted)
    own = numpy.arange(len(wanted)) if owner is None else numpy.array(owner)
    return Predictions(count or len(set(own.tolist())), own, said, wanted, numpy.array(nll, dtype=float))


SKLEARN = given([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1])
LABELS = given([[0, 0, 0], [1, 1, 1], [0, 1, 1]], [[0, 0, 0], [1, 1, 1], [1, 1, 0]])
SCIPY = given([[0.0], [0.0], [0.0], [1.0], [1.0], [1.0], [1.0]], [[float(x)] for x in range(7)])
RANKS = given([[5.0], [6.0], [7.0], [8.0], [7.0]], [[1.0], [2.0], [3.0], [4.0], [5.0]])
# Two samples of three and one tokens, a third of which nothing was predicted.
TOKENS = given([7, 8, 9, 5], [7, 8, 1, 5], [0.5, 0.25, 2.0, 0.25], [0, 0, 0, 2], count=3)


@pytest.mark.parametrize(
    ("name", "predictions", "wanted"),
    [
        # The examples in the docstrings of scikit-learn 1.9.
        ("accuracy", given([0, 1, 2, 3], [0, 2, 1, 3]), 0.5),
        ("f1_macro", SKLEARN, 0.26666666666666666),
        ("f1_micro", SKLEARN, 0.3333333333333333),
        ("f1_weighted", SKLEARN, 0.26666666666666666),
        ("f1_macro", LABELS, (2 / 3 + 1 + 2 / 3) / 3),
        ("accuracy", LABELS, 2 / 3),
        ("matthews_correlation", given([1, 1, 1, 0], [1, 0, 1, 1]), -1 / 3),
        ("f1", given([0, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0]), 0.8),
        # Those of SciPy 1.17.
        ("pearsonr", SCIPY, 0.8660254037844386),
        ("spearmanr", RANKS, 0.8207826816681233),
        ("mse", RANKS, (16 + 16 + 16 + 16 + 4) / 5),
        ("loss", TOKENS, 0.75),
        ("perplexity", TOKENS, math.exp(0.75)),
        ("accuracy", TOKENS, 0.75),
        ("exact_match", TOKENS, 0.5),
        # One label of one: its F1, and not that of its absence too.
        ("f1_macro", given([[1], [0], [1]], [[1], [0], [0]]), 2 / 3),
    ],
)
def test_golden_figures(name: str, predictions: Predictions, wanted: float) -> None:
    assert BY_NAME[name].scorer(predictions).value() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "references", "exact_match", "f1"),
    [
        # Of the official script's rules: case, punctuation, articles and space do not count.
        ("1976", ["1976"], 1, 1),
        ("the Santa Clara, California", ["Santa Clara California."], 1, 1),
        ("Denver", ["Denver Broncos", "The Denver Broncos!"], 0, 2 / 3),
        ("in the city of Paris", ["Paris", "city of light"], 0, 4 / 7),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", ["a"], 1, 1),
        ("a a b", ["a b b"], 0, 2 / 3),
    ],
)
def test_answers_as_squad_compares_them(
    answer: str, references: list[str], exact_match: float, f1: float
) -> None:
    assert exact(answer, json.dumps(references)) == exact_match
    assert overlap(answer, json.dumps(references)) == pytest.approx(f1)


def random_predictions(name: str) -> Predictions:
    draw = numpy.random.default_rng(5)
    if name in ("pearsonr", "spearmanr", "mse"):
        values = draw.normal(size=(40, 1))
        return given(values, values + draw.normal(size=(40, 1)))
    owner = numpy.sort(draw.integers(30, size=200))
    reference = draw.integers(2 if name == "f1" else 5, size=200)
    predicted = numpy.where(draw.random(200) < 0.6, reference, draw.integers(2, size=200))
    return Predictions(30, owner, predicted, reference, draw.random(200))


def repeated(predictions: Predictions, counts: Any) -> Predictions:
    """The resample as data: every sample's rows as often as it counts."""
    rows: list[int] = []
    owner: list[int] = []
    for sample in numpy.repeat(numpy.arange(predictions.count), counts):
        own = numpy.flatnonzero(predictions.owner == sample)
        owner += [len(set(owner))] * len(own)
        rows += own.tolist()
    nll = predictions.nll[rows] if len(predictions.nll) else predictions.nll
    return Predictions(
        max(owner) + 1, numpy.array(owner), predictions.predicted[rows], predictions.reference[rows], nll
    )


@pytest.mark.parametrize("name", [*BY_NAME, "labels f1_macro", "labels f1_micro", "labels f1_weighted"])
def test_a_resample_is_the_metric_of_its_rows(name: str) -> None:
    metric, draw = BY_NAME[name.split()[-1]], numpy.random.default_rng(0)
    predictions = random_predictions(name)
    if name.startswith("labels"):
        shape = (30, 4)
        predictions = given(draw.integers(2, size=shape), draw.integers(2, size=shape))
    counts = draw.multinomial(predictions.count, [1 / predictions.count] * predictions.count, size=20)
    got = metric.scorer(predictions).resampled(counts.astype(float))
    wanted = [metric.scorer(repeated(predictions, row)).value() for row in counts]
    assert_allclose(got, wanted, rtol=1e-10)
    ones = numpy.ones((1, predictions.count))
    assert_allclose(
        metric.scorer(predictions).resampled(ones)[0], metric.scorer(predictions).value(), rtol=1e-10
    )


def test_every_task_has_metrics_of_its_own() -> None:
    for kind, names in DEFAULTS.items():
        assert all(kind in BY_NAME[name].kinds for name in names)
    several = Regression("mean", {"x": 0, "y": 1})
    assert [one.name for one in metrics_of(several, None, "m")] == ["mse"]
    assert [one.name for one in metrics_of(Regression(), None, "m")] == ["pearsonr"]
    assert [one.name for one in metrics_of(CausalLM(), ("perplexity", "loss"), "m")] == ["perplexity", "loss"]


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (CausalLM(), "pearsonr", r"metric 'pearsonr' does not fit m \(causal-lm\); those that do: accuracy, exact_match"),
        (SequenceClassification("mean", NAMES), "rouge", "metric 'rouge' is not known and does not fit m"),
        (SequenceClassification("mean", NAMES | {"c": 2}), "f1", "does not fit m .sequence-classification, 3 labels"),
        (Regression("mean", NAMES), "pearsonr", "those that do: mse"),
        (MultiLabelClassification("mean", NAMES), "matthews_correlation", "f1_macro, f1_micro, f1_weighted"),
    ],
)  # fmt: skip
def test_a_metric_that_does_not_fit_is_an_error(task: Any, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        metrics_of(task, name, "m")


def test_a_correlation_with_a_constant_is_not_a_number() -> None:
    constant = given([[1.0], [2.0], [3.0]], [[1.0], [1.0], [1.0]])
    assert math.isnan(BY_NAME["pearsonr"].scorer(constant).value())
