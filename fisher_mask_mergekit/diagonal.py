"""The full diagonal Fisher information: one value per parameter."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.blocks import wide_dtype
from fisher_mask_mergekit.diagonal_gradients import DiagonalGradients
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.passes import frozen, no_sample, run_samples
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.summed import Squares
from fisher_mask_mergekit.tally import Settle, Tally
from fisher_mask_mergekit.tasks import Batch, Task


@dataclass(frozen=True)
class DiagonalFisher:
    """What :func:`diagonal_fisher` measured.

    Attributes:
        fisher: Per parameter, by its name in the model, a tensor of its shape, non-negative, in nats squared;
            float32, or float64 if that is the parameter's.
        samples: N.
        loss: Mean over samples of their negative log-likelihood, in nats.
        accuracy: Mean over samples of the share of predictions whose most probable outcome is the data's.
        one_by_one: Whether samples ran one at a time, because not every parameter's gradient can be told apart
            in a batch.
    """

    fisher: dict[str, Tensor]
    samples: int
    loss: float
    accuracy: float
    one_by_one: bool


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    labels: Labels = "data",
    seed: int = 0,
    tally: Tally[str] | None = None,
    on_batch: Callable[[Batch, Tally[str]], None] = lambda batch, tally: None,
    settle: Settle[str] = lambda tally: tally,
) -> DiagonalFisher:
    r"""Diagonal Fisher information of a model's parameters.

    .. math:: F_i = \frac{1}{N} \sum_{n=1}^{N} \left( \partial \ell_n / \partial \theta_i \right)^2

    with :math:`\ell_n = -\log p(y_n \mid x_n)` in nats. The mean runs over samples, never over batches.

    One backward pass of a batch's summed loss brings every module the gradient of its output; with the
    module's input, that gives each sample's gradient of the module's own parameters, which is squared, added,
    and dropped before the next. So beside model and result, there is one parameter's gradient at a time.
    A parameter that several runs of modules share (tied embeddings, a layer that is run again) waits for the
    last of them: it is the sum of its gradients that is squared.

    Where that cannot be, all samples run one at a time, and autograd's own gradients are squared and dropped
    as they arrive: if a parameter enters the loss other than through the module that holds it, or a module's
    input or output does not hold the samples one after the other. Both are looked for, not assumed.

    Args:
        model: A model with the task's head. Put in evaluation mode, and left as it was found.
        batches: The samples. An iterator is enough; it is read once.
        task: What the loss is.
        labels: As in :func:`~fisher_mask_mergekit.fisher.mask_fisher`.
        seed: For ``sampled``.
        tally: What was summed over samples before, to go on from; added to in place.
        on_batch: Called after every batch, with what was summed up to there.
        settle: Called after the last batch; what it returns is made means of, in place.

    Returns:
        The Fisher information, zero for a parameter that no gradient reaches, and what else was seen.

    Raises:
        MeasurementError: If there is no sample; a loss or a gradient is not finite (names the parameter); or a
            sample gives something else by itself than in its batch.

    Reference: Matena and Raffel 2022, arXiv 2111.09832.
    """
    gradients = DiagonalGradients(model, floating(model), Squares(), tally or Tally())
    gradients.tally.check_shapes({name: tuple(value.shape) for name, value in gradients.parameters.items()})
    with frozen(model), gradients.attached():
        run_samples(gradients, batches, task, labels=labels, seed=seed, on_batch=on_batch)
    return _means(settle(gradients.tally), gradients.parameters)


def _means(tally: Tally[str], parameters: Mapping[str, nn.Parameter]) -> DiagonalFisher:
    if tally.samples == 0:
        raise no_sample()
    samples, fisher = tally.samples, {}
    for name, parameter in parameters.items():
        total = tally.sums.pop(name, None)
        if total is None:
            total = torch.zeros_like(parameter, dtype=wide_dtype(parameter))
        check_finite(total, name)
        fisher[name] = total.div_(samples)
    return DiagonalFisher(fisher, samples, tally.loss / samples, tally.correct / samples, tally.one_by_one)


def floating(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name."""
    return {name: value for name, value in model.named_parameters() if value.is_floating_point()}


def check_finite(total: Tensor, name: str) -> None:
    """Refuse sums over a parameter's gradients that are no numbers.

    Raises:
        MeasurementError: If one is not (names the parameter and where).
    """
    if not bool(total.isfinite().all()):
        place = (~total.isfinite()).nonzero()[0].tolist()
        raise MeasurementError(
            f"the gradient of {name} at {place} is not finite ({total[tuple(place)].item()}); try another dtype, or "
            "look for infinities in the checkpoint"
        )
