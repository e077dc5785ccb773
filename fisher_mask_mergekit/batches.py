"""From samples to batches: tokens, then padding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.data import Samples
from fisher_mask_mergekit.errors import CheckpointError, DataError
from fisher_mask_mergekit.tasks import IGNORED, Batch, Encoded, Task, Tokenization


@dataclass(frozen=True)
class EncodedSamples:
    """The drawn samples as tokens.

    Attributes:
        samples: By their place among the drawn ones; those of which nothing is left to predict are left out.
        truncated: How many of them were longer than they may be.
        left_out: How many were left out.
    """

    samples: dict[int, Encoded]
    truncated: int
    left_out: int


def encode_samples(samples: Samples, task: Task, how: Tokenization) -> EncodedSamples:
    """Tokenise and truncate.

    Raises:
        DataError: If nothing is left to predict of any sample, or a sample is not what the task reads.
        CheckpointError: If the tokenizer lacks something that the task needs.
    """
    kept = {}
    for index, (text, label) in enumerate(zip(samples.texts, samples.labels, strict=True)):
        encoded = task.encode(text, label, index, how)
        if encoded is not None:
            kept[index] = encoded
    if not kept:
        raise DataError(
            f"none of the {len(samples.texts)} samples holds anything to predict for {task.kind} within "
            f"{how.max_length} tokens"
        )
    truncated = sum(encoded.truncated for encoded in kept.values())
    return EncodedSamples(kept, truncated, len(samples.texts) - len(kept))


def lacks_for_padding(tokenizer: Any) -> str | None:
    """What a tokenizer lacks to put samples of unequal length into one batch; None if nothing."""
    if tokenizer.pad_token_id is None:
        return "padding token"
    return None if "attention_mask" in tokenizer.model_input_names else "attention mask"


def padded_batches(
    encoded: EncodedSamples,
    tokenizer: Any,
    *,
    batch_size: int,
    by_length: bool,
    device: torch.device,
) -> Iterator[Batch]:
    """Pad on the right and batch.

    Args:
        encoded: What to batch.
        tokenizer: The checkpoint's own.
        batch_size: Samples per batch.
        by_length: Whether to put samples of like length together, longest first, instead of in the
            order drawn: less padding, and a lack of memory shows at once.
        device: Where the batches go.
    """
    order = list(encoded.samples)
    if by_length:
        order.sort(key=lambda index: -_length(encoded.samples[index].inputs["input_ids"]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        rows = [encoded.samples[i] for i in index]
        inputs = {
            name: _padded([row.inputs[name] for row in rows], _filler(name, tokenizer, rows), device)
            for name in rows[0].inputs
        }
        yield Batch(inputs, _padded([row.labels for row in rows], IGNORED, device), tuple(index))


def _filler(name: str, tokenizer: Any, rows: list[Encoded]) -> int:
    """What an input is padded with.

    Raises:
        CheckpointError: If that is not known.
    """
    known = {"attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id}
    if tokenizer.pad_token_id is not None:
        known["input_ids"] = tokenizer.pad_token_id
    if name not in known and len(rows) > 1:
        raise CheckpointError(f"the tokenizer gives {name}, which cannot be padded; take batch_size 1")
    return known.get(name, 0)


def _padded(rows: list[Any], filler: int, device: torch.device) -> Tensor:
    """Numbers, or lists of them (of lists), as one tensor; short innermost lists are filled on the right."""
    width = _length(rows)
    filled = torch.tensor(_filled(rows, width, filler), dtype=_dtype(rows, device))
    return filled.to(device)


def _dtype(rows: Any, device: torch.device) -> torch.dtype:
    while isinstance(rows, list) and rows:
        rows = rows[0]
    if isinstance(rows, float):
        return torch.float32 if device.type == "mps" else torch.float64
    return torch.long


def _length(row: Any) -> int:
    """The longest innermost list; 0 for a number."""
    if not isinstance(row, list):
        return 0
    return max((_length(part) for part in row), default=0) or len(row)


def _filled(row: list[Any], width: int, filler: int) -> list[Any]:
    if row and isinstance(row[0], list):
        return [_filled(part, width, filler) for part in row]
    return row + [filler] * (width - len(row))
