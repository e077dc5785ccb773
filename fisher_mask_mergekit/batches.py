"""From tokens to batches."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.encoding import EncodedSamples
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.tasks import IGNORED, Batch, Encoded

FIRST_TOKENS = 2048
"""Tokens of a batch if nobody says otherwise: all that a processor gains by batches; a GPU's first."""


@dataclass(frozen=True)
class Limit:
    """How much a batch may hold. A sample that is more by itself is a batch of its own.

    Attributes:
        tokens: Tokens, padding included; None for any number.
        rows: Samples; None for any number.
    """

    tokens: int | None = None
    rows: int | None = None

    def allows(self, rows: int, width: int) -> bool:
        """Whether so many samples of so many tokens each are one batch."""
        return not (self.tokens and rows * width > self.tokens) and not (self.rows and rows > self.rows)


def growing_limits(
    device: torch.device, rows: int | None, agree: Callable[[bool], bool] | None = None
) -> Iterator[Limit]:
    """From :data:`FIRST_TOKENS`, on a GPU twice as many after every two batches while as much memory is free as was used.

    Two, since a batch is made while the one before it runs, which must be no larger than what is known of: the one before that.

    Args:
        device: Where the batches run.
        rows: Samples at most; None for any number.
        agree: Whether memory is full anywhere, where several processes must have alike batches.
    """
    tokens = FIRST_TOKENS
    if device.type == "cuda":  # What an earlier model took says nothing of this one.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    while True:
        yield Limit(tokens, rows)
        yield Limit(tokens, rows)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            full = free <= torch.cuda.max_memory_reserved(device)
            tokens *= 1 if (full if agree is None else agree(full)) else 2


def lacks_for_padding(tokenizer: Any) -> str | None:
    """What a tokenizer lacks to put samples of unequal length into one batch; None if nothing."""
    if tokenizer.pad_token_id is None:
        return "padding token"
    return None if "attention_mask" in tokenizer.model_input_names else "attention mask"


def padded_batches(
    encoded: EncodedSamples,
    tokenizer: Any,
    *,
    limits: Limit | Iterator[Limit],
    by_length: bool,
    device: torch.device,
    skip: int = 0,
) -> Iterator[Batch]:
    """Pad on the right and batch.

    Args:
        encoded: What to batch.
        tokenizer: The checkpoint's own.
        limits: How much a batch may hold: every one, or one after the other.
        by_length: Whether to put samples of like length together, longest first, instead of in the
            order drawn: less padding, and a lack of memory shows at once.
        device: Where the batches go. On any but the CPU, which has nothing to spare for it, each is made while the one before
            it runs.
        skip: How many samples of that order to leave out at its beginning. Where a batch ended there, and all may hold
            the same, those after it are the batches that they would be without.
    """
    limits = repeat(limits) if isinstance(limits, Limit) else limits
    make, plans = partial(_batch, encoded, tokenizer, device), _plans(encoded, limits, by_length, skip)
    return map(make, plans) if device.type == "cpu" else _ahead(make, plans, device)


def _ahead(
    make: Callable[[list[int]], Batch], plans: Iterator[list[int]], device: torch.device
) -> Iterator[Batch]:
    """Batches as planned, one made in advance, by a thread for which ``cuda`` is the same GPU as for this one.

    Plans are not made in the thread: they may hang on how much memory is free, or on what other processes say.
    """
    is_cuda = device.type == "cuda"
    prepare = partial(torch.cuda.set_device, torch.empty(0, device=device).device) if is_cuda else None
    with ThreadPoolExecutor(1, "batches", prepare) as thread:
        coming: Future[Batch] | None = None
        for plan in plans:
            coming, ready = thread.submit(make, plan), coming
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def _plans(
    encoded: EncodedSamples, limits: Iterator[Limit], by_length: bool, skip: int
) -> Iterator[list[int]]:
    """Which samples are a batch."""
    widths = {index: _width(sample) for index, sample in encoded.samples.items()}
    order = _longest_first(widths) if by_length else list(widths)
    start = skip
    while start < len(order):
        limit, stop, width = next(limits), start + 1, widths[order[start]]
        while stop < len(order):
            width = max(width, widths[order[stop]])
            if not limit.allows(stop + 1 - start, width):
                break
            stop += 1
        yield order[start:stop]
        start = stop


def batches_in_step(
    encoded: EncodedSamples,
    tokenizer: Any,
    *,
    limits: Iterator[Limit],
    rank: int,
    count: int,
    device: torch.device,
) -> Iterator[Batch]:
    """One process's share in batches, longest samples first: all processes have as many of them, of as many samples each.

    Where fewer samples are left than there are processes, those without one get one that does not count.

    Args:
        encoded: All samples.
        tokenizer: The checkpoint's own.
        limits: How much a batch may hold, one after the other; the same in all processes.
        rank: Which process.
        count: How many there are.
        device: Where the batches go.
    """
    widths = {index: _width(sample) for index, sample in encoded.samples.items()}
    order = _longest_first(widths)
    while order:
        limit, rows = next(limits), 1
        while (rows + 1) * count <= len(order) and limit.allows(rows + 1, widths[order[0]]):
            rows += 1
        turn, order = order[: rows * count], order[rows * count :]
        own = turn[rank::count]
        yield replace(_batch(encoded, tokenizer, device, own or turn[:1]), counts=bool(own))


def _batch(encoded: EncodedSamples, tokenizer: Any, device: torch.device, index: list[int]) -> Batch:
    rows = [encoded.samples[i] for i in index]
    inputs = {
        name: _padded([row.inputs[name] for row in rows], _filler(name, tokenizer, rows), device)
        for name in rows[0].inputs
    }
    return Batch(inputs, _padded([row.labels for row in rows], IGNORED, device), tuple(index))


def _longest_first(widths: Mapping[int, int]) -> list[int]:
    return sorted(widths, key=lambda index: -widths[index])


def dealt(encoded: EncodedSamples, rank: int, count: int, batch: int | None = None) -> EncodedSamples:
    """One process's share of the samples; the shares are disjoint, and one may be empty.

    Args:
        encoded: All of them.
        rank: Which share.
        count: How many shares there are.
        batch: Samples of a batch where batches are part of the definition: those are dealt whole, in the order drawn.
            None: single samples, longest first, so that all shares have like numbers of tokens.
    """
    widths = {index: _width(sample) for index, sample in encoded.samples.items()}
    order = list(widths) if batch else _longest_first(widths)
    own = {index for place, index in enumerate(order) if place // (batch or 1) % count == rank}
    return encoded.part([index in own for index in encoded.samples].__getitem__)


def _width(sample: Encoded) -> int:
    """How many tokens a sample is to the model: of a choice among several, all of theirs; of a text and its target, the longer."""
    ids = sample.inputs["input_ids"]
    return max(_length(ids) * (len(ids) if isinstance(ids[0], list) else 1), _length(sample.labels))


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
    if device.type == "cuda":  # From pinned memory, copying waits for nothing that the GPU has yet to do.
        return filled.pin_memory().to(device, non_blocking=True)
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
