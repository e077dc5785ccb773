"""Samples through a model and back, batch by batch: what every kind of Fisher information is measured in."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.apart import Seen, lie_apart
from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.settings import Labels
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task


class Gradients(Protocol):
    """Hooks on a model that take what they need out of every backward pass."""

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""

    @property
    def one_by_one(self) -> bool:
        """Whether samples must run one at a time."""

    def run(self, task: Task, batch: Batch, seen: Seen | None = None) -> Likelihood:
        """A forward pass; it fills ``seen`` with what must hold the samples one after the other.

        What an earlier batch gave that was not kept is forgotten.
        """

    def fits(self, task: Task, sample: Batch) -> bool:
        """Whether batches can be measured, as far as one sample tells."""

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


@dataclass
class Totals:
    """What was seen of the samples.

    Attributes:
        samples: N.
        loss: Sum over samples of their negative log-likelihood, in nats.
        correct: Sum over samples of the share of their predictions that are right.
    """

    samples: int = 0
    loss: float = 0.0
    correct: float = 0.0


def run_samples(
    gradients: Gradients,
    batches: Iterable[Batch],
    task: Task,
    *,
    labels: Labels,
    seed: int,
    on_batch: Callable[[Batch], None],
) -> Totals:
    """One forward pass per batch and one backward pass per outcome that the labels ask for.

    The first batch of more than one sample, and the first that is padded, decide whether the samples lie
    apart in it; else they run one at a time from then on. A batch that does not fit into memory runs in halves,
    and so does what is as large from then on.

    Raises:
        MeasurementError: If there is no sample, a loss is not finite, or a sample gives something else by
            itself than in its batch.
        torch.OutOfMemoryError: If there is no memory for a single sample.
    """
    run = _Run(gradients, task, labels, seed)
    for batch in batches:
        parts = [batch]
        while parts:
            part = parts.pop(0)
            if gradients.one_by_one and len(part.index) > 1:
                parts = [*part.split(), *parts]
            elif run.is_too_large(part):
                parts = [*part.halves(), *parts]
            else:
                parts = [*run.attempt(part), *parts]
        gradients.end_batch(len(batch.index))
        on_batch(batch)
    if run.totals.samples == 0:
        raise MeasurementError("there is no sample to measure on")
    return run.totals


@dataclass
class _Run:
    """The samples that have run.

    Attributes:
        checked: Samples of the batch that was looked into: whether they lie apart.
        checked_padded: Whether one was padded.
        too_large: The size of the smallest batch that did not fit into memory.
    """

    gradients: Gradients
    task: Task
    labels: Labels
    seed: int
    totals: Totals = field(default_factory=Totals)
    checked: int = 0
    checked_padded: bool = False
    too_large: int | None = None

    def is_too_large(self, batch: Batch) -> bool:
        """Whether one of no more than this size did not fit."""
        return len(batch.index) > 1 and self.too_large is not None and batch.size >= self.too_large

    def attempt(self, batch: Batch) -> Sequence[Batch]:
        """Run samples. Returns what is left to run: all of them where not all ran."""
        try:
            return () if self._run(batch) else (batch,)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch.index) == 1 or not self.gradients.can_forget():
                raise
            self.too_large = batch.size
        return batch.halves()

    def _run(self, batch: Batch) -> bool:
        """Run samples, unless they turn out not to lie apart, or their gradients to overflow."""
        several = len(batch.index) > 1
        padded = several and not self.checked_padded and _is_padded(batch)
        check = self.checked == 0 or (self.checked == 1 and several) or padded
        seen = Seen(len(batch.index)) if check else None
        likelihood = self.gradients.run(self.task, batch, seen)
        if seen is not None:
            apart = lie_apart(self.gradients, self.task, batch, likelihood, seen.ends)
            self.checked, self.checked_padded = len(batch.index), self.checked_padded or padded
            if not apart and not self.gradients.one_by_one:
                self.gradients.separate()
                self.checked = 0
                return False
        losses = likelihood.losses().detach()
        _check_losses(losses, batch)
        for outcomes, weight in _outcomes(likelihood, self.labels, self.seed):
            self.gradients.backward(likelihood.losses(outcomes).sum(), weight, again=self.labels == "exact")
        if self.gradients.overflowed():
            self.gradients.shrink_loss()
            return False
        loss, correct = float(losses.double().sum()), float(likelihood.correct().sum())
        self.gradients.keep()  # From here on nothing can fail: these samples count.
        self.totals.samples += len(losses)
        self.totals.loss += loss
        self.totals.correct += correct
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left; a processor's allocator and MPS raise no error of their own for it."""
    told = "can't allocate memory" in str(error) or "out of memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and told)


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
