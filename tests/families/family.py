"""One row of the tables: a tiny model of one architecture, and what to expect of it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
HIDDEN = 32
NEURONS = 56
EXPERT_NEURONS = 40
PAD = 0
# Ids from here on stand for an image, its start, its end, a video; text is drawn from 5 up to here.
TEXT_END = 60
IMAGE, IMAGE_START, IMAGE_END, VIDEO = 63, 62, 61, 60


@dataclass(frozen=True)
class Fails:
    """mergekit refuses: the error's class and a part of its message that stays the same."""

    error: str
    message: str


@dataclass(frozen=True)
class Loses:
    """mergekit ends well, but the merged checkpoint lacks exactly the tensors whose name has one of these parts."""

    parts: tuple[str, ...]


def requires(tensor: str) -> Fails:
    """Mergekit's file lists a tensor that the checkpoint lacks."""
    return Fails("RuntimeError", f"Tensor {tensor} required but not present")


# With a dense layer before them, mergekit drops the experts without a word.
NO_EXPERTS = Loses((".experts.gate_up_proj", ".experts.down_proj"))


@dataclass(frozen=True)
class Family:
    """A tiny model of one architecture.

    Attributes:
        name: Unique, e.g. ``falcon-7b``.
        cls: Name of the class in transformers.
        config: Keyword arguments of its configuration.
        inputs: What it reads, a key of ``KINDS``.
        json: mergekit's architecture file; empty where mergekit infers the architecture.
        heads: Query and key-value heads; ``(part, H, K)``, for modules whose path has that part, the
            first that fits.
        sites: Kinds of site that a mask can be put on: ``attention``, ``ffn``.
        coupled: A norm over all heads at once couples them: rows of one head move the others a little.
        merge: What plain mergekit does with two of them: ``ok``, :class:`Fails` or :class:`Loses`.
    """

    name: str
    cls: str
    config: Mapping[str, Any]
    inputs: str = "text"
    json: str = ""
    heads: tuple[tuple[str, int, int], ...] = (("", 4, 2),)
    sites: tuple[str, ...] = ("attention", "ffn")
    coupled: bool = False
    merge: str | Fails | Loses = "ok"

    def __str__(self) -> str:
        return self.name


def build(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model in which every parameter counts: biases, norms and gates that start at zero or one, too."""
    kind = getattr(transformers, family.cls)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(kind.config_class(**copy.deepcopy(dict(family.config))))
    return _moved(model.eval(), seed, 0.1)


def sibling(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model 'fine-tuned' from another: the same weights, a little moved."""
    return _moved(copy.deepcopy(model), seed, 0.05)


def siblings(family: Family, folder: Path, seeds: tuple[int, ...] = (1, 2)) -> list[Path]:
    """Checkpoints 'fine-tuned' from the family's model, saved below ``folder``."""
    parent = build(family)
    paths = [folder / f"{family.name}-{seed}" for seed in seeds]
    for path, seed in zip(paths, seeds, strict=True):
        sibling(parent, seed).save_pretrained(path)
    return paths


def inputs(family: Family, batch: int = 2, seed: int = 0, first: int = 0) -> dict[str, Tensor]:
    """Samples ``first`` to ``first + batch`` of the seed's; a sample is the same in whatever batch it comes."""
    made = [
        KINDS[family.inputs](family, index, torch.Generator().manual_seed(1000 * seed + index))
        for index in range(first, first + batch)
    ]
    return {name: torch.cat([sample[name] for sample in made]) for name in made[0]}


def _moved(model: PreTrainedModel, seed: int, by: float) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for tensor in model.state_dict(keep_vars=True).values():
        # Tied tensors are moved once.
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * by)
    return model


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(5, TEXT_END, (1, count), generator=generator)


def _text(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Padded on the right; the first sample is not."""
    ids = _words(12, generator)
    if index:
        ids[:, int(torch.randint(3, 13, (), generator=generator)) :] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _unmasked(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _words(12, generator)}


def _choices(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = [_text(family, index + choice, generator) for choice in range(3)]
    return {name: torch.stack([choice[name] for choice in drawn], 1) for name in drawn[0]}


def _seq2seq(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _text(family, index, generator) | {"decoder_input_ids": _words(7, generator)}


def _audio(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    bins, frames = family.config["num_mel_bins"], 2 * family.config["max_source_positions"]
    sound = torch.randn(1, bins, frames, generator=generator)
    return {"input_features": sound, "decoder_input_ids": _words(7, generator)}


def _with_image(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Text around the four tokens that stand for an image."""
    ids = _words(12, generator)
    ids[:, 2], ids[:, 3:7], ids[:, 7] = IMAGE_START, IMAGE, IMAGE_END
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _with_image(family, index, generator) | {
        "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)
    }


def _sized_pixels(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _pixels(family, index, generator) | {"image_sizes": torch.tensor([[16, 16]])}


def _patches(family: Family, index: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An image cut into 4 x 4 patches of 2 frames x 3 colours x 4 x 4 pixels, without a batch axis."""
    text = _with_image(family, index, generator)
    return text | {
        "mm_token_type_ids": (text["input_ids"] == IMAGE).long(),
        "pixel_values": torch.randn(16, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


KINDS: dict[str, Callable[[Family, int, torch.Generator], dict[str, Tensor]]] = {
    "text": _text,
    "text without mask": _unmasked,
    "choices": _choices,
    "seq2seq": _seq2seq,
    "audio": _audio,
    "text and pixels": _pixels,
    "text and sized pixels": _sized_pixels,
    "text and patches": _patches,
}
