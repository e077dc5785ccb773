"""What a checkpoint's loss is, per sample: the likelihood of a batch under the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from fisher_mask_mergekit.errors import CheckpointError

_SUFFIX = "ForSequenceClassification"


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        inputs: What the model takes, each ``[B, ...]``.
        labels: ``[B, ...]``, what the task compares the model's output with.
        index: Which of the drawn samples these are; seeds the draw of labels from the model.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: tuple[int, ...]

    def split(self) -> Iterator["Batch"]:
        """The same samples as batches of one."""
        if len(self.index) == 1:
            yield self
            return
        for row, index in enumerate(self.index):
            inputs = {name: tensor[row : row + 1] for name, tensor in self.inputs.items()}
            yield Batch(inputs, self.labels[row : row + 1], (index,))


@dataclass(frozen=True)
class Likelihood:
    r"""Log-likelihood of a batch: P independent predictions, each a distribution over C outcomes.

    Sample n's loss is :math:`\ell_n = - \sum_p w_p \log p(y_p \mid x_n)` over its own predictions.

    Attributes:
        log_probs: ``[P, C]``, float32 or wider, in nats.
        targets: ``[P]``, the data's outcomes.
        owner: ``[P]``, which of the batch's samples a prediction belongs to, in ascending order.
        weight: ``[P]``, 1 for a sum over a sample's predictions, 1 over their number for a mean.
        index: The batch's.
    """

    log_probs: Tensor
    targets: Tensor
    owner: Tensor
    weight: Tensor
    index: tuple[int, ...]

    def losses(self, targets: Tensor | None = None) -> Tensor:
        """Loss of each sample, ``[B]``, for the data's outcomes or for others ``[P]``."""
        wanted = self.targets if targets is None else targets
        nll = -self.log_probs.gather(1, wanted[:, None])[:, 0] * self.weight
        return nll.new_zeros(len(self.index)).index_add(0, self.owner, nll)

    def correct(self) -> Tensor:
        """Share of each sample's predictions whose most probable outcome is the data's, ``[B]``."""
        hits = (self.log_probs.argmax(-1) == self.targets).to(self.log_probs.dtype)
        zeros = hits.new_zeros(len(self.index))
        return zeros.index_add(0, self.owner, hits) / zeros.index_add(0, self.owner, torch.ones_like(hits))

    def outputs(self, sample: int) -> Tensor:
        """All that the model said of one sample, to compare two runs by."""
        return self.log_probs[self.owner == sample]

    def sampled(self, seed: int) -> Tensor:
        """Outcomes drawn from the model, ``[P]``; a draw of its own per sample, whatever the batch."""
        counts = torch.bincount(self.owner, minlength=len(self.index)).tolist()
        draws = [
            numpy.random.default_rng([seed, index]).random(count)
            for index, count in zip(self.index, counts, strict=True)
        ]
        log_probs = self.log_probs.detach()
        uniform = torch.from_numpy(numpy.concatenate(draws)).to(log_probs.device, log_probs.dtype)
        drawn = torch.searchsorted(log_probs.exp().cumsum(1), uniform[:, None])[:, 0]
        return drawn.clamp(max=log_probs.shape[1] - 1)

    def expectation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every outcome ``[P]`` and its probability per sample ``[B]``; one prediction per sample only."""
        for outcome in range(self.log_probs.shape[1]):
            yield torch.full_like(self.targets, outcome), self.log_probs.detach()[:, outcome].exp()


@dataclass(frozen=True)
class Task:
    """How a model's output is compared with the data.

    Attributes:
        name: As the recipe and the sidecar write it.
    """

    name: str

    def likelihood(self, model: torch.nn.Module, batch: Batch) -> Likelihood:
        """Run the model on a batch."""
        logits = model(**batch.inputs).logits
        log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        owner = torch.arange(len(batch.index), device=log_probs.device)
        return Likelihood(log_probs, batch.labels, owner, torch.ones_like(log_probs[:, 0]), batch.index)


def task_of(config: Any, checkpoint: str) -> Task:
    """The task of a checkpoint, by its class.

    Args:
        config: The checkpoint's transformers configuration.
        checkpoint: How the user named it, for the message.

    Raises:
        CheckpointError: If it is not known for the class; names the class, or its problem type.
    """
    names = config.architectures or ["no class at all"]
    if len(names) != 1 or not names[0].endswith(_SUFFIX):
        raise CheckpointError(
            f"{checkpoint} is a {', '.join(names)}; the pre-pass measures sequence classifiers "
            f"(a class that ends in {_SUFFIX})."
        )
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise CheckpointError(
            f"{checkpoint} has {config.num_labels} label(s) and problem type {config.problem_type}; "
            "the pre-pass measures single-label classification with at least 2 labels."
        )
    return Task("sequence-classification")
