"""F1 and Matthews on a thousand resamples at once: scikit-learn's definitions on counts of what came with what.

scikit-learn takes 3 ms for each, which would be most of an evaluation. The score itself is scikit-learn's.
"""

from dataclasses import dataclass
from typing import Literal

import numpy
from scipy import sparse

from fisher_mask_mergekit.evaluation.predictions import Array, Predictions

F1Average = Literal["binary", "macro", "micro", "weighted"]


@dataclass(frozen=True, eq=False)
class Tally:
    """Of N samples and C labels, how many of a sample's predictions are so.

    Attributes:
        labels: ``[C]``.
        both: ``[N, C]``, sparse: the label is right and predicted.
        right: ``[N, C]``, sparse: the label is right.
        predicted: ``[N, C]``, sparse: the label is predicted.
        is_multilabel: Whether a label counts also where a resample does not have it.
    """

    labels: Array
    both: sparse.csr_array
    right: sparse.csr_array
    predicted: sparse.csr_array
    is_multilabel: bool = False


def tally(predictions: Predictions) -> Tally:
    """Count, for predictions of one label each, or of 0 or 1 for every label."""
    reference, predicted = predictions.reference, predictions.predicted
    if reference.ndim > 1:
        tables = [
            sparse.csr_array(table.astype(float)) for table in (predicted * reference, reference, predicted)
        ]
        return Tally(numpy.arange(reference.shape[1]), tables[0], tables[1], tables[2], is_multilabel=True)
    labels, places = numpy.unique(numpy.concatenate([reference, predicted]), return_inverse=True)
    first, second = places[: len(reference)], places[len(reference) :]
    same = first == second
    shape = (predictions.count, len(labels))
    counted = [
        sparse.csr_array((weight.astype(float), (predictions.owner, columns)), shape=shape)
        for weight, columns in ((same, first), (same | True, first), (same | True, second))
    ]
    return Tally(labels, counted[0], counted[1], counted[2])


def f1(found: Tally, counts: Array, average: F1Average) -> Array:
    r"""Per resample, of :math:`F_c = 2 TP_c / (R_c + P_c)` over labels c, as scikit-learn averages it.

    Args:
        found: TP, R (right) and P (predicted) per sample.
        counts: ``[R, N]``.
        average: ``binary``: of label 1. ``micro``: of the sums over labels. ``macro``: the mean over labels that are
            right or predicted somewhere. ``weighted``: the mean weighted by :math:`R_c`.
    """
    both, right, predicted = counts @ found.both, counts @ found.right, counts @ found.predicted
    there = right + predicted
    if average == "binary":
        ones = found.labels == 1
        return _ratio(2 * both[:, ones].sum(1), there[:, ones].sum(1))
    if average == "micro":
        return _ratio(2 * both.sum(1), there.sum(1))
    each = _ratio(2 * both, there)
    if average == "weighted":
        return _ratio((each * right).sum(1), right.sum(1))
    return _ratio(each.sum(1), (there > 0).sum(1) if not found.is_multilabel else len(found.labels))


def matthews(found: Tally, counts: Array) -> Array:
    r"""Per resample, Gorodkin's :math:`R_K = (s \cdot TP - R \cdot P) / \sqrt{(s^2 - R \cdot R)(s^2 - P \cdot P)}`."""
    right, predicted = counts @ found.right, counts @ found.predicted
    total, both = right.sum(1), (counts @ found.both).sum(1)
    spread = (total**2 - (right**2).sum(1)) * (total**2 - (predicted**2).sum(1))
    return _ratio(total * both - (right * predicted).sum(1), numpy.sqrt(spread))


def _ratio(above: Array, below: Array | int) -> Array:
    """0 where there is nothing to divide by."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.where(numpy.asarray(below) > 0, above / below, 0.0)
