"""A model and the batches that it is measured on, as the pre-pass has them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fisher_mask_mergekit.batches import growing_limits, padded_batches
from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.tasks import Batch, Task, Tokenization, task_of

MOST_TOKENS = 512


@dataclass(frozen=True)
class Workload:
    """A model, frozen and in evaluation mode, and what it is measured on."""

    model: nn.Module
    batches: list[Batch]
    sites: tuple[Site, ...]
    task: Task
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of all samples, without padding."""
        return sum(int(batch.inputs["attention_mask"].sum()) for batch in self.batches)

    def one_by_one(self) -> "Workload":
        """The same samples in batches of one, without padding: one at a time there is nothing to pad to."""
        return replace(self, batches=list(_single_samples(self.batches)))

    def spread_out(self, count: int) -> "Workload":
        """A few of the batches, evenly over the order they are in, which is that of their samples' length."""
        count = min(count, len(self.batches))
        chosen = [self.batches[int((place + 0.5) * len(self.batches) / count)] for place in range(count)]
        return replace(self, batches=chosen)

    def one_batch(self, rows: int) -> "Workload":
        """The batch in the middle, and so many of its samples at most."""
        batch = self.batches[len(self.batches) // 2]
        while len(batch.index) > rows:
            batch, _ = batch.halves()
        return replace(self, batches=[batch])


def load_workload(checkpoint: Path, data: str, samples: int, device: torch.device) -> Workload:
    """The model and batches that ``mergekit-fisher compute`` would make of these, with its defaults."""
    settings = FisherSettings(data=data, samples=samples)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=getattr(torch, settings.dtype)
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    longest = min(MOST_TOKENS, tokenizer.model_max_length, model.config.max_position_embeddings)
    task = task_of(model.config, str(checkpoint), settings)
    sites = sites_of(model, tensor_shapes(locate(str(checkpoint))))
    model.eval().requires_grad_(False).to(device)
    batches = padded_batches(
        encode_samples(load_samples(settings, task), task, Tokenization(tokenizer, longest)),
        tokenizer,
        # Made before one runs, a GPU's double as long as the model alone leaves room: so they do where memory is plenty.
        limits=growing_limits(device, settings.rows),
        by_length=True,
        device=device,
    )
    return Workload(model, list(batches), sites, task, device)


def _single_samples(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        width = batch.inputs["input_ids"].shape[1]
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            inputs = {
                name: tensor[row : row + 1, :length]
                if tensor.shape[1:2] == (width,)
                else tensor[row : row + 1]
                for name, tensor in batch.inputs.items()
            }
            yield Batch(inputs, batch.labels[row : row + 1], batch.index[row : row + 1])
