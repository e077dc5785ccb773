"""From a data set's name to samples: loading, and the draw."""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy

from fisher_mask_mergekit.columns import find_columns, find_text
from fisher_mask_mergekit.errors import DataError, first_line
from fisher_mask_mergekit.random_text import Vocabulary
from fisher_mask_mergekit.settings import RANDOM, FisherSettings
from fisher_mask_mergekit.sidecar import DataRecord
from fisher_mask_mergekit.tasks import Task

# Where this stands first, pyarrow ends the process: https://github.com/apache/arrow/issues/47409
_NULL_ROW = re.compile(rb"(\xef\xbb\xbf)?[ \t\r]*null")
_COMMIT = re.compile(r"[0-9a-f]{40}")
OF_RANDOM_TOKENS = ("sequence-classification", "masked-lm", "causal-lm")
"""Tasks that are measured on random tokens: a text is a sample."""
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    def text(self) -> str:
        """As the user would write it, with every default spelled out."""
        if self.is_one_table or self.is_random:
            return self.path
        return f"{self.path}:{self.config or ''}:{self.split}" + (
            f"@{self.revision}" if self.revision else ""
        )

    @property
    def is_one_table(self) -> bool:
        """Whether it is a local table, which has no splits: a file, or a folder of one that datasets wrote."""
        if self.is_random:
            return False
        return Path(self.path).is_file() or (Path(self.path) / "state.json").is_file()

    @property
    def is_random(self) -> bool:
        """Whether it is no data set, but texts of random tokens."""
        return self.path == RANDOM

    @property
    def is_local(self) -> bool:
        """Whether the data lies on this machine, or is made on it."""
        return self.is_random or Path(self.path).exists()


def parse_spec(text: str, split: str = "train") -> DataSpec:
    """Parse a data set's name as the user wrote it; a path that exists is taken as it is, unless it is ``random``.

    Args:
        text: The name.
        split: The split where the name has none.

    Raises:
        DataError: If it has too many parts.
    """
    if text == RANDOM or Path(text).exists():
        return DataSpec(text, None, split, None)
    here = text.partition(":")[0]
    if "@" in here and Path(here).exists():
        # A folder here has no revisions: the sign is a part of its name.
        body, revision = text, ""
    else:
        body, _, revision = text.partition("@")
    parts = body.split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(f"data '{text}' is not of the form path[:config[:split]][@revision]")
    path, config, named = [*parts, "", ""][:3]
    if path == RANDOM:
        raise DataError(
            f"data '{text}': '{RANDOM}' has no configuration, split or revision; write {RANDOM}, or ./{RANDOM} for a folder"
        )
    return DataSpec(path, config or None, named or split, revision or None)


@dataclass(frozen=True)
class Samples:
    """The drawn samples.

    Attributes:
        texts: What the model reads, one tuple per sample.
        labels: What it is to predict, as the task has it.
        record: Where they came from.
    """

    texts: list[tuple[Any, ...]]
    labels: list[Any]
    record: DataRecord


def load_samples(
    settings: FisherSettings, task: Task, *, skip: int = 0, vocabulary: Vocabulary | None = None
) -> Samples:
    """Draw the samples that a request asks for.

    Args:
        settings: The request; ``data`` must be given.
        task: What is read of a row.
        skip: How many of the same draw to leave out, from its first.
        vocabulary: The checkpoint's, for random tokens.

    Raises:
        DataError: If the data cannot be read, has no usable columns or rows, or labels that the checkpoint
            does not have.
    """
    spec, table, rows = _draw(settings, task, skip, vocabulary)
    with _cells(settings):
        drawn = task.read(rows, settings)
    digest = hashlib.sha256()
    for text, label in zip(drawn.texts, drawn.labels, strict=True):
        digest.update(json.dumps([*text, label]).encode() + b"\n")
    record = DataRecord(
        split=spec.split,
        revision=None if spec.is_local else _loaded_revision(table, spec),
        text=drawn.columns.text,
        label=drawn.columns.label,
        label_map=drawn.label_map,
        rows=len(table),
        digest=digest.hexdigest(),
        majority=drawn.majority,
    )
    return Samples(drawn.texts, drawn.labels, record)


def load_texts(settings: FisherSettings, task: Task, *, skip: int = 0) -> list[str]:
    """What a model reads of the same draw, whatever the labels are: one text per row, equal if the rows' are.

    A causal LM's prompt is no sample by itself, so its completion belongs to it.

    Args:
        settings: The request; ``data`` must be given.
        task: Whose columns are read.
        skip: How many of the draw to leave out, from its first.

    Raises:
        DataError: If the data cannot be read, or has no usable columns or rows.
    """
    _, _, rows = _draw(settings, task, skip)
    try:
        columns = find_columns(rows.column_names, task.layouts, settings)
    except DataError:  # It may lack the labels only.
        columns = find_text(rows.column_names, task.layouts, settings)
    names = [*columns.text, *([columns.label] if columns.label and task.name == "causal-lm" else [])]
    with _cells(settings):
        return [
            json.dumps(cells, default=str)
            for cells in zip(*(map(_given, rows[name]) for name in names), strict=True)
        ]


@contextmanager
def _cells(settings: FisherSettings) -> Iterator[None]:
    """Turn what pyarrow says of cells that Python has no value for into one error: text that is not UTF-8, for one."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise DataError(f"cannot read the rows of data '{settings.data}': {first_line(error)}") from error


def _given(cell: Any) -> Any:
    """A cell without the keys that a table has because another row has them."""
    if isinstance(cell, dict):
        return {key: _given(cell[key]) for key in sorted(cell) if cell[key] is not None}
    return [_given(part) for part in cell] if isinstance(cell, list) else cell


def _draw(
    settings: FisherSettings, task: Task, skip: int, vocabulary: Vocabulary | None = None
) -> tuple[DataSpec, datasets.Dataset, datasets.Dataset]:
    """What is drawn from, and the rows."""
    spec = parse_spec(settings.data or "")
    if spec.is_random:
        if vocabulary is None:
            raise DataError(
                f"data '{RANDOM}' is random tokens, to measure on: there is nothing in them to score a model on"
            )
        if task.name not in OF_RANDOM_TOKENS:
            raise DataError(f"data '{RANDOM}' is for {', '.join(OF_RANDOM_TOKENS)}; the task is {task.name}")
        table = datasets.Dataset.from_dict({"text": vocabulary.texts(settings)})
        return spec, table, table
    table = _load(spec)
    if len(table) == 0:
        raise DataError(f"data '{settings.data}' has no rows")
    if len(table) <= skip:
        raise DataError(f"data '{settings.data}' has {len(table)} rows; after the first {skip}, none is left")
    order = numpy.random.default_rng(settings.seed).permutation(len(table))[skip:][: settings.samples]
    return spec, table, table.select(order)


def _load(spec: DataSpec) -> datasets.Dataset:
    path = Path(spec.path)
    local_file = path.suffix in LOADERS or path.is_file()
    if local_file and not path.is_file():
        raise DataError(f"there is no data file {spec.path}")
    if local_file and path.suffix not in LOADERS:
        raise DataError(f"{spec.path}: expected one of {', '.join(LOADERS)}, or a folder that datasets wrote")
    one_split = local_file or (path / "state.json").is_file()
    if one_split and (spec.config or spec.revision or spec.split != "train"):
        raise DataError(
            f"data '{spec.path}' is one local table; it has no configurations, splits or revisions"
        )
    written = one_split or (path / "dataset_dict.json").is_file()
    if path.is_dir() and not written and glob.has_magic(str(path.resolve())):
        raise DataError(
            f"data '{spec.path}': datasets would take {path.resolve()} as a pattern, and read other folders that fit "
            "it; rename the folder, or name a file in it"
        )
    if local_file and path.stat().st_size == 0:
        raise DataError(f"data '{spec.path}' has no rows")
    if local_file and LOADERS[path.suffix] == "json":
        _refuse_null_rows(path)
    try:
        if local_file:
            # A name with brackets, for one, is taken as a pattern, and another file may fit it.
            name = glob.escape(str(path.absolute()))
            return datasets.load_dataset(LOADERS[path.suffix], data_files=name, split="train")
        if (path / "dataset_dict.json").is_file():
            return _from_disk(path / spec.split)
        if (path / "state.json").is_file():
            return _from_disk(path)
        return datasets.load_dataset(spec.path, spec.config, split=spec.split, revision=spec.revision)
    except Exception as error:  # datasets raises its own, pyarrow's, the hub's and built-in errors.
        # This one only says that something went wrong; the others say what, in the user's words.
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = first_line(error.__cause__ if wrapped and error.__cause__ else error)
        if "corresponds to no data" in reason:  # What datasets calls a split without rows.
            raise DataError(f"data '{spec.path}' has no rows") from error
        raise DataError(f"cannot load data '{spec.path}' (split {spec.split}): {reason}") from error


def _refuse_null_rows(path: Path) -> None:
    rows = _list_of_rows(path)
    if rows is not None:
        if None in rows:
            number = rows.index(None) + 1
            raise DataError(f"data '{path}', row {number}: expected a JSON object, got null")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if _NULL_ROW.match(line):
                raise DataError(f"data '{path}', line {number}: expected a JSON object, got null")


def _list_of_rows(path: Path) -> list[Any] | None:
    """A file's rows, if all of it is one list; None if it has an object per line."""
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return None
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # datasets says better what is wrong.
        return None
    return rows if isinstance(rows, list) else None


def _from_disk(folder: Path) -> datasets.Dataset:
    """A table that datasets wrote, of files in its own folder: a path in what was downloaded is not followed."""
    for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        if Path(file["filename"]).name != file["filename"]:
            raise ValueError(f"state.json names '{file['filename']}', which is not in the folder")
    return datasets.load_from_disk(str(folder))


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
