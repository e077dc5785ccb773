"""The Fisher information of every parameter by the means of its rows and columns."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import fsum, prod

from torch import Tensor, nn

from fisher_mask_mergekit.diagonal import check_finite, floating
from fisher_mask_mergekit.diagonal_gradients import DiagonalGradients
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.marginals import Marginals, TokenMarginals, row_axes
from fisher_mask_mergekit.passes import frozen, no_sample, run_samples
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch, Task


@dataclass(frozen=True)
class FactoredFisher:
    """What :func:`factored_fisher` measured.

    Attributes:
        fisher: Per parameter, by its name in the model, the means of rows and columns, packed as
            :class:`~fisher_mask_mergekit.factors.Split` says; non-negative, in nats squared; float64, or float32
            where the device has no float64.
        axes: Per parameter, the axis that its rows lie along.
        shapes: Per parameter, its shape.
        samples: N.
        loss: Mean over samples of their negative log-likelihood, in nats.
        accuracy: Mean over samples of the share of predictions whose most probable outcome is the data's.
        one_by_one: Whether samples ran one at a time, because not every parameter's gradient can be told apart
            in a batch.
    """

    fisher: dict[str, Tensor]
    axes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    samples: int
    loss: float
    accuracy: float
    one_by_one: bool

    @property
    def mean(self) -> float:
        """Over all elements of all parameters."""
        sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        sums = (
            float(self.fisher[name][:, : self.split(name).rows].mean()) * size for name, size in sizes.items()
        )
        return fsum(sums) / sum(sizes.values())

    def split(self, name: str) -> Split:
        """How a parameter's elements fall into matrices."""
        return Split.of(self.shapes[name], self.axes[name])


def factored_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    by_token: bool = False,
    labels: Labels = "data",
    seed: int = 0,
    tally: Tally[str] | None = None,
    on_batch: Callable[[Batch, Tally[str]], None] = lambda batch, tally: None,
    settle: Settle[str] = lambda tally: tally,
) -> FactoredFisher:
    r"""Means over rows and over columns of the diagonal Fisher information of a model's parameters.

    .. math:: r_i = \frac{1}{C} \sum_j F_{ij}, \qquad c_j = \frac{1}{R} \sum_i F_{ij}, \qquad
        \hat F_{ij} = \frac{r_i c_j}{\bar c}

    of every parameter ``[R, C]``, with F what :func:`~fisher_mask_mergekit.diagonal.diagonal_fisher` measures, exactly.
    :math:`\hat F` is the matrix of rank one that is nearest to F in the generalised Kullback-Leibler divergence. A
    vector is C = 1: its values are F itself. Parameters of more axes are several matrices, see
    :func:`~fisher_mask_mergekit.marginals.row_axes`.

    F is never made: see :class:`~fisher_mask_mergekit.marginals.Marginals`. Hooks, samples that do not lie apart, and
    parameters that several runs share are those of the full diagonal.

    Args:
        model: A model with the task's head. Put in evaluation mode, and left as it was found.
        batches: The samples. An iterator is enough; it is read once.
        task: What the loss is.
        by_token: Of a linear map's matrix, square every token's gradient by itself instead of a sample's, their sum. It takes
            less time. Where several runs share the matrix, and of all other parameters, it is the sample's still.
        labels: As in :func:`~fisher_mask_mergekit.fisher.mask_fisher`.
        seed: For ``sampled``.
        tally: What was summed over samples before, to go on from; added to in place.
        on_batch: Called after every batch, with what was summed up to there.
        settle: Called after the last batch; what it returns is made means of, in place.

    Returns:
        The Fisher information, zero for a parameter that no gradient reaches, and what else was seen.

    Raises:
        MeasurementError: If there is no sample; a loss or a gradient is not finite (names the parameter); a sample
            gives something else by itself than in its batch; or, ``by_token``, if samples run one at a time.

    Reference: Lee and Seung 1999; arXiv 1804.04235, which factors second moments alike.
    """
    parameters, axes = floating(model), row_axes(model)
    splits = {name: Split.of(parameter.shape, axes[name]) for name, parameter in parameters.items()}
    summed = (TokenMarginals if by_token else Marginals)(splits)
    gradients = DiagonalGradients(model, parameters, summed, tally or Tally())
    gradients.tally.check_shapes({name: split.packed for name, split in splits.items()})
    with frozen(model), gradients.attached():
        run_samples(
            gradients,
            batches,
            task,
            labels=labels,
            seed=seed,
            on_batch=_in_batches(on_batch) if by_token else on_batch,
        )
    tally = settle(gradients.tally)
    if tally.samples == 0:
        raise no_sample()
    return FactoredFisher(
        _means(tally, {name: summed.zeros(name, value) for name, value in parameters.items()}, splits),
        {name: axes[name] for name in parameters},
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        tally.samples,
        tally.loss / tally.samples,
        tally.correct / tally.samples,
        tally.one_by_one,
    )


def _in_batches(on_batch: Callable[[Batch, Tally[str]], None]) -> Callable[[Batch, Tally[str]], None]:
    """The same, but an error if samples run one at a time: autograd's gradients then are sums over tokens."""

    def checked(batch: Batch, tally: Tally[str]) -> None:
        if tally.one_by_one:
            raise MeasurementError(
                "not every parameter's gradient can be told apart in a batch, so a token's cannot either; take estimator sample"
            )
        on_batch(batch, tally)

    return checked


def _means(tally: Tally[str], zeros: Mapping[str, Tensor], splits: Mapping[str, Split]) -> dict[str, Tensor]:
    """Over samples, and over what each sum is of."""
    fisher = {}
    for name, split in splits.items():
        total = tally.sums.pop(name, zeros[name])
        check_finite(total, name)
        total[:, : split.rows] /= split.columns * tally.samples
        total[:, split.rows :] /= split.rows * tally.samples
        fisher[name] = total
    return fisher
