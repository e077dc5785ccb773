"""The likelihood of a batch under a model: what the losses, the accuracy and drawn labels come from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy
import torch
from torch import Tensor

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.settings import Loss

IGNORED = -100
"""The label of a position that is not predicted."""


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        inputs: What the model takes, each ``[B, ...]``.
        labels: ``[B, ...]``, what the task compares the model's output with.
        index: Which of the drawn samples these are; seeds the draw of labels from the model.
        counts: Whether they count; else they run only because other processes need this one's weights meanwhile.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: tuple[int, ...]
    counts: bool = True

    def split(self) -> Iterator["Batch"]:
        """The same samples as batches of one, without the padding on their right."""
        if len(self.index) == 1:
            yield self
            return
        for row in range(len(self.index)):
            yield self.single(row).trimmed()

    def single(self, row: int) -> "Batch":
        """A batch of one of the samples, padded as it is."""
        if len(self.index) == 1:  # Images in patches are given with no batch axis, one sample at a time.
            return self
        return self._rows(row, row + 1)

    def trimmed(self) -> "Batch":
        """The same samples without the padding that all of them have on their right."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return self
        width = max(1, int(self.lengths().max()))
        inputs = {
            name: tensor[..., :width] if tensor.shape == mask.shape else tensor
            for name, tensor in self.inputs.items()
        }
        of_tokens = self.labels.shape == mask.shape and bool((self.labels[..., width:] == IGNORED).all())
        return replace(self, inputs=inputs, labels=self.labels[..., :width] if of_tokens else self.labels)

    def lengths(self) -> Tensor:
        """How wide each sample is without the padding on its right, ``[B]``; as wide as the batch if nothing says so."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            ids = next(iter(self.inputs.values()))
            return torch.full((len(self.index),), ids.shape[-1])
        places = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
        return (places * (mask != 0)).flatten(1).amax(1)

    @property
    def size(self) -> int:
        """How many elements its largest input or output has: tokens, padding included."""
        return max(tensor.numel() for tensor in (*self.inputs.values(), self.labels))

    def halves(self) -> tuple["Batch", "Batch"]:
        """The same samples as two batches."""
        middle = len(self.index) // 2
        return self._rows(0, middle), self._rows(middle, len(self.index))

    def _rows(self, start: int, stop: int) -> "Batch":
        inputs = {name: tensor[start:stop] for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels[start:stop], self.index[start:stop], self.counts)

    def padded_right(self, *, labels_too: bool = False) -> "Batch":
        """The same samples with their padding on the right.

        So no model needs to be told at which position a sample begins.

        Args:
            labels_too: Whether there is a label for every token, which moves along.
        """
        mask = self.inputs.get("attention_mask")
        if mask is None or bool((mask[..., 0] != 0).all()):
            return self
        inputs = {
            name: padded_right(tensor, mask) if tensor.shape == mask.shape else tensor
            for name, tensor in self.inputs.items()
        }
        return replace(
            self, inputs=inputs, labels=padded_right(self.labels, mask) if labels_too else self.labels
        )


def padded_right(tensor: Tensor, mask: Tensor) -> Tensor:
    """Every row of ``[..., T]`` moved to the left by as many places as its mask begins with zeros."""
    width = mask.shape[-1]
    padding = (mask != 0).long().argmax(-1, keepdim=True)
    return tensor.gather(-1, (torch.arange(width, device=mask.device) + padding) % width)


class Likelihood(Protocol):
    """Log-likelihood of a batch of samples that do not depend on each other."""

    @property
    def index(self) -> tuple[int, ...]:
        """The batch's."""

    def losses(self, outcomes: Tensor | None = None) -> Tensor:
        """Loss of each sample, ``[B]``, for the data's outcomes or for others."""

    def correct(self) -> Tensor:
        """Share of each sample's predictions that are right, ``[B]``; not a number where none can be."""

    def outputs(self, sample: int) -> Tensor:
        """All that the model said of one sample, finite, to compare two runs by."""

    def sampled(self, seed: int) -> Tensor:
        """Outcomes drawn from the model; a draw of its own per sample, whatever the batch."""

    def expectation(self) -> Iterator[tuple[Tensor, Tensor]]:
        r"""Outcomes and weights ``[B]`` of which :math:`\sum_o w_o (d\ell(o))^2 = E[(d\ell)^2]`.

        Only where every sample has one prediction.
        """


@dataclass(frozen=True)
class Categorical:
    r"""P independent predictions, each a distribution over C outcomes.

    Sample n's loss is :math:`\ell_n = - \sum_p w_p \log p(y_p \mid x_n)` over its own predictions.

    Attributes:
        log_probs: ``[P, C]``, float32 or wider, in nats.
        targets: ``[P]``, the data's outcomes; ``IGNORED`` where it says none.
        owner: ``[P]``, which of the batch's samples a prediction belongs to, in ascending order.
        weight: ``[P]``, 1 for a sum over a sample's predictions, 1 over their number for a mean.
        index: The batch's.
    """

    log_probs: Tensor
    targets: Tensor
    owner: Tensor
    weight: Tensor
    index: tuple[int, ...]

    @classmethod
    def of(
        cls, logits: Tensor, targets: Tensor, owner: Tensor, loss: Loss, index: tuple[int, ...]
    ) -> "Categorical":
        """From logits ``[P, C]``.

        Raises:
            MeasurementError: If a sample has no prediction.
        """
        counts = torch.bincount(owner, minlength=len(index))
        if not bool(counts.all()):
            empty = index[int((counts == 0).nonzero()[0, 0])]
            raise MeasurementError(f"sample {empty} has nothing to predict")
        log_probs = torch.log_softmax(wide(logits), -1)
        weight = torch.ones_like(log_probs[:, 0])
        return cls(log_probs, targets, owner, weight / counts[owner] if loss == "mean" else weight, index)

    def losses(self, outcomes: Tensor | None = None) -> Tensor:
        """Loss of each sample, ``[B]``, for the data's outcomes or for others ``[P]``.

        Where the data says none, the mean over the model's own: the entropy.
        """
        known = self.targets != IGNORED
        wanted = self.targets.where(known, 0) if outcomes is None else outcomes
        nll = -self.log_probs.gather(1, wanted[:, None])[:, 0]
        if outcomes is None and not bool(known.all()):
            nll = torch.where(known, nll, torch.special.entr(self.log_probs.exp()).sum(1))
        nll = nll * self.weight
        return nll.new_zeros(len(self.index)).index_add(0, self.owner, nll)

    def correct(self) -> Tensor:
        """Share of each sample's predictions whose most probable outcome is the data's, ``[B]``."""
        hits = (self.log_probs.argmax(-1) == self.targets).to(self.log_probs.dtype)
        hits = hits.masked_fill(self.targets == IGNORED, torch.nan)
        zeros = hits.new_zeros(len(self.index))
        return zeros.index_add(0, self.owner, hits) / zeros.index_add(0, self.owner, torch.ones_like(hits))

    def outputs(self, sample: int) -> Tensor:
        """A sample's log-probabilities, 0 for what cannot be (padding is no answer)."""
        own = self.log_probs[self.owner == sample]
        return own.masked_fill(own == -torch.inf, 0.0)

    def sampled(self, seed: int) -> Tensor:
        """Outcomes drawn from the model, ``[P]``; a draw of its own per sample, whatever the batch."""
        drawn = []
        for row, index in enumerate(self.index):
            cumulated = self.log_probs.detach()[self.owner == row].exp().cumsum(1)
            # In (0, 1], and of the sum as rounded: so an outcome of probability 0 is never drawn.
            uniform = 1 - numpy.random.default_rng([seed, index]).random(len(cumulated))
            at = torch.from_numpy(uniform).to(cumulated.dtype).to(cumulated.device)
            drawn.append(torch.searchsorted(cumulated, at[:, None] * cumulated[:, -1:])[:, 0])
        return torch.cat(drawn)

    def expectation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every outcome ``[P]`` and its probability per sample ``[B]``; one prediction per sample only."""
        for outcome in range(self.log_probs.shape[1]):
            yield torch.full_like(self.targets, outcome), self.log_probs.detach()[:, outcome].exp()


@dataclass(frozen=True)
class Gaussian:
    r"""K real outputs per sample, each the mean of a Gaussian of variance 1.

    Sample n's loss is :math:`\ell_n = w \sum_k \frac{1}{2} (y_{nk} - \mu_{nk})^2`, the negative log-likelihood
    less a constant that no gradient sees.

    Attributes:
        means: ``[B, K]``, float32 or wider.
        targets: ``[B, K]``; not a number where the data says none.
        weight: 1 for a sum over a sample's outputs, 1 / K for a mean.
        index: The batch's.
    """

    means: Tensor
    targets: Tensor
    weight: float
    index: tuple[int, ...]

    def losses(self, outcomes: Tensor | None = None) -> Tensor:
        """Loss of each sample, ``[B]``, for the data's values or for others ``[B, K]``.

        Where the data says none, the mean over the model's own: the square is the variance, 1.
        """
        known = torch.where(self.targets.isnan(), self.means.detach() + 1, self.targets)
        wanted = known if outcomes is None else outcomes
        return (wanted - self.means).square().sum(1) * (self.weight / 2)

    def correct(self) -> Tensor:
        """Not a number: no real value is right or wrong."""
        return torch.full_like(self.means[:, 0].detach(), torch.nan)

    def outputs(self, sample: int) -> Tensor:
        """A sample's means."""
        return self.means[sample]

    def sampled(self, seed: int) -> Tensor:
        """Values drawn from the model, ``[B, K]``; a draw of its own per sample, whatever the batch."""
        shape = self.means.shape[1]
        noise = [numpy.random.default_rng([seed, index]).standard_normal(shape) for index in self.index]
        drawn = torch.from_numpy(numpy.stack(noise)).to(self.means.dtype)
        return self.means.detach() + drawn.to(self.means.device)

    def expectation(self) -> Iterator[tuple[Tensor, Tensor]]:
        r"""The single value :math:`\mu + 1` with weight 1; one output per sample only.

        :math:`d\ell = (\mu - y) \, d\mu` and :math:`E[(\mu - y)^2] = 1`, so :math:`E[(d\ell)^2] = (d\mu)^2`,
        which is what :math:`y = \mu + 1` gives.
        """
        yield self.means.detach() + 1, torch.ones_like(self.means[:, 0].detach())


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
