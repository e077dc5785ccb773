"""From a data set's name to samples: loading, columns, labels, the draw, and token batches."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch

from fisher_mask_mergekit.errors import DataError, first_line
from fisher_mask_mergekit.labels import label_name, match_labels
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import DataRecord
from fisher_mask_mergekit.tasks import Batch

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
    ("sentence1",),
    ("text_a",),
)
LABEL_COLUMNS = ("label", "labels")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class DataSpec:
    """A parsed ``path[:config[:split]][@revision]``.

    Attributes:
        path: Hub id, or local file or folder.
        config: The data set's configuration.
        split: ``train`` if not given.
        revision: Branch, tag or commit on the hub.
    """

    path: str
    config: str | None
    split: str
    revision: str | None

    @property
    def is_local(self) -> bool:
        """Whether the data lies on this machine."""
        return Path(self.path).exists()


def parse_spec(text: str) -> DataSpec:
    """Parse a data set's name as the user wrote it; a path that exists is taken as it is.

    Raises:
        DataError: If it has too many parts.
    """
    if Path(text).exists():
        return DataSpec(text, None, "train", None)
    body, _, revision = text.partition("@")
    parts = body.split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(f"data '{text}' is not of the form path[:config[:split]][@revision]")
    path, config, split = [*parts, "", ""][:3]
    return DataSpec(path, config or None, split or "train", revision or None)


@dataclass(frozen=True)
class Samples:
    """The drawn samples.

    Attributes:
        texts: One or two texts each.
        labels: Indices of the checkpoint's labels.
        record: Where they came from.
    """

    texts: list[tuple[str, ...]]
    labels: list[int]
    record: DataRecord


def load_samples(settings: FisherSettings, label2id: Mapping[str, int]) -> Samples:
    """Draw the samples that a request asks for.

    Args:
        settings: The request; ``data`` must be given.
        label2id: The checkpoint's label names and indices.

    Raises:
        DataError: If the data cannot be read, has no usable columns or rows, or labels that the checkpoint
            does not have.
    """
    spec = parse_spec(settings.data or "")
    table = _load(spec)
    if len(table) == 0:
        raise DataError(f"data '{settings.data}' has no rows")
    text, label = _columns(table.column_names, settings)
    order = numpy.random.default_rng(settings.seed).permutation(len(table))[: settings.samples]
    rows = table.select(order)
    texts = list(zip(*(_texts(rows[column], column, settings.data) for column in text), strict=True))
    raw = list(rows[label])
    mapping = match_labels(raw, table.features[label], label2id, settings)
    digest = hashlib.sha256()
    for words, value in zip(texts, raw, strict=True):
        digest.update(json.dumps([*words, mapping[value]]).encode() + b"\n")
    record = DataRecord(
        split=spec.split,
        revision=None if spec.is_local else _loaded_revision(table, spec),
        text=text,
        label=label,
        label_map={
            str(label_name(table.features[label], value)): mapping[value] for value in sorted(mapping)
        },
        rows=len(table),
        digest=digest.hexdigest(),
        majority=max(raw.count(value) for value in set(raw)) / len(raw),
    )
    return Samples(texts, [mapping[value] for value in raw], record)


def _load(spec: DataSpec) -> datasets.Dataset:
    path = Path(spec.path)
    local_file = path.suffix in _LOADERS or path.is_file()
    if local_file and not path.is_file():
        raise DataError(f"there is no data file {spec.path}")
    if local_file and path.suffix not in _LOADERS:
        raise DataError(
            f"{spec.path}: expected one of {', '.join(_LOADERS)}, or a folder that datasets wrote"
        )
    one_split = local_file or (path / "state.json").is_file()
    if one_split and (spec.config or spec.revision or spec.split != "train"):
        raise DataError(
            f"data '{spec.path}' is one local table; it has no configurations, splits or revisions"
        )
    if local_file and path.stat().st_size == 0:
        raise DataError(f"data '{spec.path}' has no rows")
    try:
        if local_file:
            return datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(spec.path)[spec.split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(spec.path)
        return datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision)
    except Exception as error:  # datasets raises its own, pyarrow's, the hub's and built-in errors.
        # This one only says that something went wrong; the others say what, in the user's words.
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = first_line(error.__cause__ if wrapped and error.__cause__ else error)
        if "corresponds to no data" in reason:  # What datasets calls a split without rows.
            raise DataError(f"data '{spec.path}' has no rows") from error
        raise DataError(f"cannot load data '{spec.path}' (split {spec.split}): {reason}") from error


def hub_revision(spec: DataSpec) -> str | None:
    """The commit that the data set's name stands for now; None for local data and if the hub does not say."""
    from huggingface_hub import HfApi

    if spec.is_local:
        return None
    try:
        return HfApi().dataset_info(spec.path, revision=spec.revision, timeout=10).sha
    except Exception:  # Offline, for one: there may be a copy in the local cache.
        return None


def _loaded_revision(table: datasets.Dataset, spec: DataSpec) -> str | None:
    """The commit that the rows came from.

    Raises:
        DataError: If it is not the one asked for: offline, datasets loads the latest copy that it has.
    """
    # datasets keeps what it made of a commit in a folder of the commit's name.
    names = {Path(file["filename"]).parent.name for file in table.cache_files}
    loaded = next((name for name in names if _COMMIT.fullmatch(name)), None) or hub_revision(spec)
    if spec.revision and _COMMIT.fullmatch(spec.revision) and loaded != spec.revision:
        raise DataError(
            f"data '{spec.path}': revision {spec.revision} was asked for, but the hub cannot be reached and the "
            f"local copy is of revision {loaded}"
        )
    return loaded


def _columns(names: Sequence[str], settings: FisherSettings) -> tuple[tuple[str, ...], str]:
    there = f"its columns are {', '.join(names)}"
    known = next((known for known in TEXT_COLUMNS if all(name in names for name in known)), ())
    text: tuple[str, ...] = known if settings.text is None else _as_tuple(settings.text)
    if not text:
        raise DataError(f"no text column found in '{settings.data}'; {there}; name it with text")
    label = (
        settings.label
        if settings.label is not None
        else next((name for name in LABEL_COLUMNS if name in names), None)
    )
    if label is None:
        raise DataError(f"no label column found in '{settings.data}'; {there}; name it with label")
    missing = [name for name in (*text, label) if name not in names]
    if missing:
        raise DataError(f"'{settings.data}' has no column '{missing[0]}'; {there}")
    return text, label


def _as_tuple(text: str | tuple[str, ...]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _texts(column: Sequence[Any], name: str, data: str | None) -> list[str]:
    for value in column:
        if not isinstance(value, str):
            raise DataError(f"'{data}': column '{name}' holds {type(value).__name__}, expected text")
    return list(column)


def token_batches(
    samples: Samples,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    by_length: bool,
    device: torch.device,
) -> Iterator[Batch]:
    """Tokenise, pad on the right and batch.

    Args:
        samples: What to batch.
        tokenizer: The checkpoint's own.
        max_length: Tokens per sample at most; longer ones are truncated.
        batch_size: Samples per batch.
        by_length: Whether to put samples of like length together, longest first, instead of in the
            order drawn: less padding, and a lack of memory shows at once.
        device: Where the batches go.
    """
    tokenizer.padding_side = "right"
    encoded = [
        tokenizer(*words, truncation=True, max_length=max_length, padding=False) for words in samples.texts
    ]
    for text, tokens in zip(samples.texts, encoded, strict=True):
        if not tokens["input_ids"]:
            raise DataError(f"a sample has no tokens: {text!r:.80}")
    order = list(range(len(encoded)))
    if by_length:
        order.sort(key=lambda index: -len(encoded[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        rows = [encoded[i] for i in index]
        padded = (
            tokenizer.pad(rows, return_tensors="pt")
            if len(rows) > 1
            else rows[0].convert_to_tensors("pt", True)
        )
        yield Batch(
            inputs={name: tensor.to(device) for name, tensor in padded.items()},
            labels=torch.tensor([samples.labels[i] for i in index], device=device),
            index=tuple(index),
        )
