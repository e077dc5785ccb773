"""From samples to tokens."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import datasets
import torch

from fisher_mask_mergekit.data import Samples
from fisher_mask_mergekit.errors import DataError, first_line
from fisher_mask_mergekit.tasks import Encoded, Task, Tokenization

SAMPLES_PER_PROCESS = 8192
"""Fewer are tokenised in less time than it takes to start a process that does it."""


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

    def part(self, is_in: Callable[[int], bool]) -> "EncodedSamples":
        """Only the samples at some places among these."""
        samples = {
            index: sample for place, (index, sample) in enumerate(self.samples.items()) if is_in(place)
        }
        return EncodedSamples(samples, sum(one.truncated for one in samples.values()), self.left_out)


def encode_samples(samples: Samples, task: Task, how: Tokenization) -> EncodedSamples:
    """Tokenise and truncate.

    Raises:
        DataError: If nothing is left to predict of any sample, or a sample is not what the task reads.
        CheckpointError: If the tokenizer lacks something that the task needs.
    """
    kept = {}
    for index, encoded in enumerate(_each_encoded(samples, task, how)):
        if encoded is not None:
            kept[index] = encoded
    if not kept:
        raise DataError(
            f"none of the {len(samples.texts)} samples holds anything to predict for {task.kind} within "
            f"{how.max_length} tokens"
        )
    truncated = sum(encoded.truncated for encoded in kept.values())
    return EncodedSamples(kept, truncated, len(samples.texts) - len(kept))


def _each_encoded(samples: Samples, task: Task, how: Tokenization) -> Iterable[Encoded | None]:
    """Every sample as tokens, in several processes where they pay: no more than torch has threads."""
    count = len(samples.texts)
    processes = min(torch.get_num_threads(), count // SAMPLES_PER_PROCESS)
    if processes < 2:
        return (_encode(samples, task, how, index) for index in range(count))
    table = datasets.Dataset.from_dict({"index": range(count)})
    try:
        encoded = table.map(
            partial(_encode_pickled, samples, task, how),
            input_columns="index",
            remove_columns="index",
            batched=True,
            num_proc=processes,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint="not kept",
        )
    except RuntimeError as error:  # A process was ended, for want of memory for one.
        raise DataError(f"the samples could not be tokenised: {first_line(error)}") from error
    return map(pickle.loads, encoded["encoded"])


def _encode(samples: Samples, task: Task, how: Tokenization, index: int) -> Encoded | None:
    return task.encode(samples.texts[index], samples.labels[index], index, how)


def _encode_pickled(
    samples: Samples, task: Task, how: Tokenization, places: list[int]
) -> dict[str, list[bytes]]:
    """Of several samples. Pickled, since a table has one type per column and no lists of nothing."""
    return {"encoded": [pickle.dumps(_encode(samples, task, how, index)) for index in places]}
