"""One point of a growth curve: the pre-pass of a random BERT on random tokens, timed or weighed, in this process alone.

    python benchmarks/growth_point.py {time,memory} JSON REPEATS

``growth.py`` runs this; the JSON has the fields of :class:`Point`. Prints a line of JSON.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from meters import Timed, device_name, peak_bytes
from scaling import Shape, backward_flops, forward_flops
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers.utils import logging

from fisher_mask_mergekit.batches import FIRST_TOKENS
from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.skeleton import sites_in
from fisher_mask_mergekit.tasks import Batch, SequenceClassification

VOCABULARY, LABELS = 1000, 2
LONG = 2e12
"""FLOPs beyond which a point is timed once."""


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        samples: N.
        length: Tokens of each sample.
        layers: L.
        hidden: The model's width; its FFN has four times as many neurons.
        heads: H.
        recompute: Whether activations are computed again instead of kept.
        batch: Tokens of a batch.
        device: Where.
    """

    samples: int
    length: int
    layers: int
    hidden: int
    heads: int
    recompute: bool = False
    batch: int = FIRST_TOKENS
    device: str = "auto"

    @property
    def shape(self) -> Shape:
        """For what it costs on paper."""
        return Shape(
            "", self.layers, self.hidden, self.heads, self.heads, self.hidden // self.heads,
            4 * self.hidden, LABELS, VOCABULARY, matrices=2,
        )  # fmt: skip

    @property
    def flops(self) -> int:
        """Of forward and activation-only backward pass, and of layers that run again; a classifier's head is as good as nothing."""
        shape, tokens = self.shape, self.samples * self.length
        forward = forward_flops(shape, tokens, self.length)
        again = forward * (self.layers - 1) // self.layers if self.recompute else 0
        return forward + backward_flops(shape, tokens, self.length) + again


def random_model(point: Point, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        num_labels=LABELS,
        hidden_size=point.hidden,
        num_hidden_layers=point.layers,
        num_attention_heads=point.heads,
        intermediate_size=4 * point.hidden,
        max_position_embeddings=point.length,
    )
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model.eval().requires_grad_(False).to(device)


def random_batches(point: Point, device: torch.device) -> Iterator[Batch]:
    """Made when they are asked for, so that their number takes no memory."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, point.batch // point.length)
    for start in range(0, point.samples, rows):
        index = tuple(range(start, min(start + rows, point.samples)))
        ids = torch.randint(VOCABULARY, (len(index), point.length), generator=generator)
        labels = torch.randint(LABELS, (len(index),), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        yield Batch({name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device), index)


def pre_pass(model: nn.Module, point: Point, device: torch.device) -> None:
    batches = random_batches(point, device)
    mask_fisher(model, batches, sites_in(model), SequenceClassification(), recompute=point.recompute)


def measure(what: str, point: Point, repeats: int) -> dict[str, object]:
    """Seconds of some runs, or the peak of one in bytes, beyond what the loaded model takes."""
    device = pick_device(None if point.device == "auto" else point.device)
    model = random_model(point, device)
    warm = Point(samples=2, length=2, layers=1, hidden=point.heads, heads=point.heads)
    pre_pass(random_model(warm, device), warm, device)  # What is set up once is not to be seen.
    run = partial(pre_pass, model, point, device)
    if what == "memory":
        used = peak_bytes(device, run)
        return {"peak": used["peak"] - used["before"], "of": used["of"]}
    repeats = 1 if point.flops > LONG else repeats
    timed = Timed(run, repeats)
    for _ in range(repeats):
        timed.once(device)
    return {
        "flops": point.flops,
        "wall": timed.wall,
        "processor": timed.processor,
        "device": device_name(device),
    }


def main() -> None:
    logging.disable_progress_bar()
    print(json.dumps(measure(sys.argv[1], Point(**json.loads(sys.argv[2])), int(sys.argv[3]))))


if __name__ == "__main__":
    main()
