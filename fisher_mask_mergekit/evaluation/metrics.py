"""Metrics by the names that the `evaluate` library has for them: which fit a task, and how each is computed.

F1 and Matthews are scikit-learn's, correlations SciPy's; what is a mean over predictions is a mean. On a resample of the
bootstrap, a metric is a function of how often each sample was drawn: counts are ``[R, N]``, for R resamples of N samples,
and the values ``[R]``.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.evaluation.answers import exact, overlap
from fisher_mask_mergekit.evaluation.outcomes import F1Average, f1, matthews, tally
from fisher_mask_mergekit.evaluation.predictions import Array, Predictions
from fisher_mask_mergekit.tasks import Task

_LANGUAGE = ("masked-lm", "causal-lm", "seq2seq-lm")
_CLASSES = ("sequence-classification", "multi-label-classification", "token-classification")


@dataclass(frozen=True)
class Scorer:
    """A metric of given predictions.

    Attributes:
        value: The metric itself.
        resampled: Counts ``[R, N]`` to values ``[R]``.
    """

    value: Callable[[], float]
    resampled: Callable[[Array], Array]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: As the recipe writes it.
        kinds: The tasks that it fits.
        scorer: What makes it of predictions.
        higher_is_better: Whether a larger value is.
    """

    name: str
    kinds: tuple[str, ...]
    scorer: Callable[[Predictions], Scorer]
    higher_is_better: bool = True


def metrics_of(task: Task, names: str | Sequence[str] | None, model: str) -> tuple[Metric, ...]:
    """The metrics asked for, else the task's own; the first is the one that is normalised.

    Args:
        task: What is scored.
        names: As the user gave them.
        model: How the user named the checkpoint, for the message.

    Raises:
        RecipeError: If there is no such metric, or it does not fit the task.
    """
    if names is None:
        several = task.kind == "regression" and not task.predicts_once
        names = ("mse",) if several else DEFAULTS[task.kind]
    names = (names,) if isinstance(names, str) else names
    fitting = {one.name: one for one in METRICS if _fits(one, task)}
    for name in names:
        if name not in fitting:
            known = "" if any(one.name == name for one in METRICS) else "is not known and "
            raise RecipeError(
                f"metric '{name}' {known}does not fit {model} ({_described(task)}); those that do: {', '.join(fitting)}"
            )
    return tuple(fitting[name] for name in dict.fromkeys(names))


def _fits(metric: Metric, task: Task) -> bool:
    if task.kind not in metric.kinds:
        return False
    if metric.name == "f1" and task.kind == "sequence-classification":
        return len(getattr(task, "label2id", ())) == 2
    return metric.name not in ("pearsonr", "spearmanr") or task.predicts_once


def _described(task: Task) -> str:
    labels = len(getattr(task, "label2id", ()))
    return f"{task.kind}, {labels} label{'s' * (labels != 1)}" if labels else task.kind


def _counted(count: int, resampled: Callable[[Array], Array]) -> Scorer:
    """A metric that every sample counts in once."""
    return Scorer(lambda: float(resampled(numpy.ones((1, count)))[0]), resampled)


def ratio_of_sums(sums: Array, sizes: Array, then: Callable[[Array], Array] = lambda ratio: ratio) -> Scorer:
    """A function of what all samples' sums ``[N]`` come to, over their sizes ``[N]``."""
    return _counted(len(sums), lambda counts: then((counts @ sums) / (counts @ sizes)))


def _mean(of: Callable[[Predictions], Array]) -> Callable[[Predictions], Scorer]:
    """The mean over predictions of a number that each has, ``[P]``."""

    def scorer(predictions: Predictions) -> Scorer:
        sums = _per_sample(predictions, of(predictions))
        return ratio_of_sums(sums, _per_sample(predictions, numpy.ones(len(predictions.owner))))

    return scorer


def _per_sample(predictions: Predictions, values: Array) -> Array:
    return numpy.bincount(predictions.owner, weights=values, minlength=predictions.count)


def _right(predictions: Predictions) -> Array:
    """Whether a prediction is right; of several labels, whether all are."""
    right = predictions.predicted == predictions.reference
    return (right.all(1) if right.ndim > 1 else right).astype(float)


def _squared(predictions: Predictions) -> Array:
    return numpy.square(predictions.predicted - predictions.reference).mean(1)


def _perplexity(predictions: Predictions) -> Scorer:
    sums = _per_sample(predictions, predictions.nll)
    return ratio_of_sums(sums, _per_sample(predictions, numpy.ones(len(predictions.owner))), numpy.exp)


def _exact_match(predictions: Predictions) -> Scorer:
    """Of texts by SQuAD's rule; of tokens, whether all of a sample's are right.

    The latter is whether greedy decoding would give the reference: as long as every token is right, the next one is
    predicted from the very same text.
    """
    if predictions.predicted.dtype.kind == "U":
        return _mean(lambda given: _each(exact, given))(predictions)
    wrong = _per_sample(predictions, 1 - _right(predictions))
    there = _per_sample(predictions, numpy.ones(len(predictions.owner))) > 0
    hits = ((wrong == 0) & there).astype(float)
    return ratio_of_sums(hits, there.astype(float))


def _each(of: Callable[[str, str], float], predictions: Predictions) -> Array:
    pairs = zip(predictions.predicted.tolist(), predictions.reference.tolist(), strict=True)
    return numpy.array([of(answer, references) for answer, references in pairs])


def _f1(average: F1Average) -> Callable[[Predictions], Scorer]:
    """scikit-learn's; ``binary`` is the F1 of label 1. 0 where no label is there and none is predicted."""

    def scorer(predictions: Predictions) -> Scorer:
        if predictions.predicted.dtype.kind == "U":
            return _mean(lambda given: _each(overlap, given))(predictions)

        def value() -> float:
            from sklearn.metrics import f1_score

            given = [predictions.reference, predictions.predicted]
            if given[0].ndim > 1 and given[0].shape[1] == 1:  # Else 0 would be a label of its own.
                return float(f1_score(*(labels[:, 0] for labels in given), zero_division=0.0))
            return float(f1_score(*given, average=average, zero_division=0.0))

        found = tally(predictions)
        return Scorer(value, lambda counts: f1(found, counts, average))

    return scorer


def _matthews(predictions: Predictions) -> Scorer:
    def value() -> float:
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(predictions.reference, predictions.predicted))

    found = tally(predictions)
    return Scorer(value, lambda counts: matthews(found, counts))


def _correlation(name: str) -> Callable[[Predictions], Scorer]:
    """SciPy's, over the samples as often as they count; not a number where all values are the same."""

    def scorer(predictions: Predictions) -> Scorer:
        from scipy import stats  # Takes seconds to import, and most tasks need none of it.

        of = getattr(stats, name)
        predicted, reference = predictions.predicted[:, 0], predictions.reference[:, 0]

        def one(count: Array) -> float:
            rows = numpy.repeat(predictions.owner, count.astype(int))
            return float(of(predicted[rows], reference[rows]).statistic) if len(rows) > 1 else numpy.nan

        def resampled(counts: Array) -> Array:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of constant input.
                return numpy.array([one(count) for count in counts])

        return _counted(predictions.count, resampled)

    return scorer


METRICS = (
    Metric("accuracy", (*_CLASSES, "multiple-choice", *_LANGUAGE), _mean(_right)),
    Metric("f1", ("sequence-classification", "question-answering"), _f1("binary")),
    Metric("f1_macro", _CLASSES, _f1("macro")),
    Metric("f1_micro", _CLASSES, _f1("micro")),
    Metric("f1_weighted", _CLASSES, _f1("weighted")),
    Metric("matthews_correlation", ("sequence-classification", "token-classification"), _matthews),
    Metric("pearsonr", ("regression",), _correlation("pearsonr")),
    Metric("spearmanr", ("regression",), _correlation("spearmanr")),
    Metric("mse", ("regression",), _mean(_squared), higher_is_better=False),
    Metric("exact_match", ("question-answering", "causal-lm", "seq2seq-lm"), _exact_match),
    Metric(
        "loss",
        ("sequence-classification", "token-classification", "multiple-choice", *_LANGUAGE),
        _mean(lambda predictions: predictions.nll),
        higher_is_better=False,
    ),
    Metric("perplexity", _LANGUAGE, _perplexity, higher_is_better=False),
)
DEFAULTS: dict[str, tuple[str, ...]] = {
    "sequence-classification": ("accuracy",),
    "multi-label-classification": ("f1_micro",),
    "regression": ("pearsonr",),
    "token-classification": ("accuracy", "f1_macro"),
    "question-answering": ("f1", "exact_match"),
    "multiple-choice": ("accuracy",),
    **dict.fromkeys(_LANGUAGE, ("loss", "perplexity")),
}
