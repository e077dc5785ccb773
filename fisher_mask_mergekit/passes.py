"""Samples through a model and back, batch by batch: what every kind of Fisher information is measured in."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.apart import Seen, ignores_padding, lie_apart
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.tally import Tally
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task

Agree = Callable[[bool], bool]
"""Whether something is so in any process of a run."""


class Gradients(Protocol):
    """Hooks on a model that take what they need out of every backward pass."""

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""

    @property
    def tally(self) -> Tally[Any]:
        """What was summed so far, added to in place."""

    def run(self, task: Task, batch: Batch, seen: Seen | None = None) -> Likelihood:
        """A forward pass; it fills ``seen`` with what must hold the samples one after the other.

        What an earlier batch gave that was not kept is forgotten.
        """

    def alone(self, task: Task, sample: Batch, seen: Seen) -> tuple[Likelihood, bool]:
        """A forward pass of one sample that is only looked at, and whether batches can be measured, as far as it tells."""

    def separate(self) -> None:
        """From now on samples run one at a time."""

    def backward(self, loss: Tensor, weight: Tensor | None, *, again: bool) -> None:
        """A backward pass: add what it gives, times a weight ``[B]`` if there is one.

        Args:
            loss: The samples' losses, summed.
            weight: What each sample's squared gradient is multiplied by.
            again: Whether another backward pass of the same forward pass follows.
        """

    def overflowed(self) -> bool:
        """Whether what the backward passes since the forward pass gave is not finite, but may be with a smaller loss."""

    def shrink_loss(self) -> None:
        """From now on losses are multiplied by half of what they were, on their way back."""

    def keep(self) -> None:
        """What the backward passes since the forward pass gave counts."""

    def can_forget(self) -> bool:
        """Whether what they gave can still be forgotten."""

    def end_batch(self, samples: int) -> None:
        """A whole batch has run."""


def run_samples(
    gradients: Gradients,
    batches: Iterable[Batch],
    task: Task,
    *,
    labels: Labels,
    seed: int,
    on_batch: Callable[[Batch, Tally[Any]], None],
    agree: Agree | None = None,
) -> None:
    """One forward pass per batch and one backward pass per outcome that the labels ask for; the tally grows by each.

    The first batch of more than one sample, and the first that is padded, decide whether the samples lie
    apart in it and padding changes nothing; else they run one at a time from then on, without padding. A batch that does not fit into memory runs in halves,
    and so does what is as large from then on.

    Args:
        gradients: Of the model.
        batches: The samples.
        task: What the loss is.
        labels: Which outcomes.
        seed: For ``sampled``.
        on_batch: Called after every batch that counts, with what was summed up to there.
        agree: If every process of a run has only a part of the model, all must run it equally often: with batches of
            as many samples, and what one of them decides holds for all. None of those runs in halves.

    Raises:
        MeasurementError: If a loss is not finite, or a sample gives something else by itself than in its batch.
        torch.OutOfMemoryError: If there is no memory for a single sample.
    """
    run = _Run(gradients, task, labels, seed, agree)
    for batch in batches:
        parts = [batch]
        while parts:
            part = parts.pop(0)
            if gradients.tally.one_by_one and len(part.index) > 1:
                parts = [*part.split(), *parts]
            elif run.is_too_large(part):
                parts = [*part.halves(), *parts]
            else:
                parts = [*run.attempt(part), *parts]
        if batch.counts:
            gradients.end_batch(len(batch.index))
            on_batch(batch, gradients.tally)


@dataclass(frozen=True)
class _Run:
    """How samples run."""

    gradients: Gradients
    task: Task
    labels: Labels
    seed: int
    agree: Agree | None

    @property
    def tally(self) -> Tally[Any]:
        return self.gradients.tally

    def is_too_large(self, batch: Batch) -> bool:
        """Whether one of no more than this size did not fit."""
        smallest = self.tally.too_large
        return len(batch.index) > 1 and smallest is not None and batch.size >= smallest

    def attempt(self, batch: Batch) -> Sequence[Batch]:
        """Run samples. Returns what is left to run: all of them where not all ran."""
        try:
            return () if self._run(batch) else (batch,)
        except RuntimeError as error:
            may_halve = len(batch.index) > 1 and self.agree is None and self.gradients.can_forget()
            if not is_out_of_memory(error) or not may_halve:
                raise
            self.tally.too_large = batch.size
        return batch.halves()

    def _run(self, batch: Batch) -> bool:
        """Run samples, unless they turn out not to lie apart, or their gradients to overflow."""
        several = len(batch.index) > 1
        tally = self.tally
        padded = self._anywhere(several and not tally.checked_padded and _is_padded(batch))
        check = self._anywhere(tally.checked == 0 or (tally.checked == 1 and several) or padded)
        seen = Seen(len(batch.index)) if check else None
        likelihood = self.gradients.run(self.task, batch, seen)
        if seen is not None:
            apart = lie_apart(self.gradients, self.task, batch, likelihood, seen)
            if padded:
                apart &= ignores_padding(self.gradients, self.task, batch, likelihood)
            apart = not self._anywhere(not apart)
            tally.checked, tally.checked_padded = len(batch.index), tally.checked_padded or padded
            if not apart and not tally.one_by_one:
                self.gradients.separate()
                tally.checked = 0
                return False
        losses = likelihood.losses().detach()
        _check_losses(losses, batch)
        for outcomes, weight in _outcomes(likelihood, self.labels, self.seed):
            self.gradients.backward(likelihood.losses(outcomes).sum(), weight, again=self.labels == "exact")
        if self._anywhere(self.gradients.overflowed()):
            self.gradients.shrink_loss()
            return False
        if not batch.counts:
            return True
        loss, correct = float(losses.double().sum()), float(likelihood.correct().sum())
        self.gradients.keep()  # From here on nothing can fail: these samples count.
        tally.samples += len(losses)
        tally.loss += loss
        tally.correct += correct
        return True

    def _anywhere(self, flag: bool) -> bool:
        return flag if self.agree is None else self.agree(flag)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left; a processor's allocator and MPS raise no error of their own for it."""
    told = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and told)


def no_sample() -> MeasurementError:
    """The error where nothing has run."""
    return MeasurementError("there is no sample to measure on")


def _is_padded(batch: Batch) -> bool:
    mask = batch.inputs.get("attention_mask")
    return mask is not None and not bool(mask.all())


def _check_losses(losses: Tensor, batch: Batch) -> None:
    if not bool(losses.isfinite().all()):
        bad = int((~losses.isfinite()).nonzero()[0, 0])
        raise MeasurementError(
            f"the loss of sample {batch.index[bad]} is {losses[bad].item()}; try another dtype, or look for infinities "
            "in the checkpoint"
        )


def _outcomes(
    likelihood: Likelihood, labels: Labels, seed: int
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The outcomes to take gradients for, one backward pass each, and their weights ``[B]``."""
    if labels == "data":
        yield None, None
    elif labels == "sampled":
        yield likelihood.sampled(seed), None
    else:
        yield from likelihood.expectation()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients; everything as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(True)
