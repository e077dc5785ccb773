"""Which columns of a data set a task reads: by convention, or as the user names them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.settings import FisherSettings

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
_PACKED = {"input_ids", "position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q", "seq_lengths"}


@dataclass(frozen=True)
class Layout:
    """Columns that belong together.

    Attributes:
        text: What the model reads.
        label: What it is compared with; None where that is the text itself, or there is nothing.
    """

    text: tuple[str, ...]
    label: str | None


def layouts(text: Iterable[tuple[str, ...]], label: Iterable[str]) -> tuple[Layout, ...]:
    """Every text with every label, the first text first."""
    names = tuple(label)
    return tuple(Layout(columns, name) for columns in text for name in names)


def find_columns(names: Sequence[str], known: Sequence[Layout], settings: FisherSettings) -> Layout:
    """The columns to read: the first layout that is there, unless ``text`` or ``label`` name them.

    Where a task can do without a label column, ``text`` alone says that there is none.

    Raises:
        DataError: If there are none, or not those that were named; says which there are.
    """
    there = f"its columns are {', '.join(names)}"
    if settings.label is not None and all(one.label is None for one in known):
        raise DataError(f"label names column '{settings.label}', but the task reads no label column")
    if settings.text is not None:
        text = (settings.text,) if isinstance(settings.text, str) else settings.text
        found = _with_text(names, known, text, settings.label)
    else:
        usable = [one for one in known if settings.label is None or one.label is not None]
        usable = [one for one in usable if all(name in names for name in one.text)]
        if not usable:
            _refuse_packed(names, settings)
            looked = ", ".join(dict.fromkeys(" and ".join(one.text) for one in known))
            raise DataError(
                f"no text column found in '{settings.data}'; {there}, looked for were {looked}; name it with text"
            )
        whole = [one for one in usable if one.label is None or one.label in names]
        found = Layout(usable[0].text, settings.label) if settings.label else next(iter(whole), None)
    if found is None:
        raise DataError(f"no label column found in '{settings.data}'; {there}; name it with label")
    missing = [name for name in (*found.text, found.label) if name is not None and name not in names]
    if missing:
        raise DataError(f"'{settings.data}' has no column '{missing[0]}'; {there}")
    return found


def _with_text(
    names: Sequence[str], known: Sequence[Layout], text: tuple[str, ...], label: str | None
) -> Layout | None:
    """The layout of text columns that the user named; None if it lacks a label column."""
    if label is not None or any(one.label is None for one in known):
        return Layout(text, label)
    beside = sorted(known, key=lambda one: one.text != text)
    found = next((one.label for one in beside if one.label in names), None)
    return Layout(text, found) if found else None


def find_text(names: Sequence[str], known: Sequence[Layout], settings: FisherSettings) -> Layout:
    """The text columns of a layout, whatever label columns there are.

    Raises:
        DataError: If there are none, or not those that were named.
    """
    free = [Layout(one.text, None) for one in known]
    return find_columns(names, free, settings.model_copy(update={"label": None}))


def _refuse_packed(names: Sequence[str], settings: FisherSettings) -> None:
    found = [name for name in names if name in _PACKED]
    if found:
        raise DataError(
            f"'{settings.data}' holds token ids (column {found[0]}) and no text: samples that were packed into one "
            "sequence cannot be told apart; give the text they were made of, one sample per row"
        )


def texts(rows: Any, column: str, settings: FisherSettings) -> list[str]:
    """A column of text.

    Raises:
        DataError: If it holds anything else.
    """
    values = list(rows[column])
    for value in values:
        if not isinstance(value, str):
            raise DataError(
                f"'{settings.data}': column '{column}' holds {type(value).__name__}, expected text"
            )
    return values


def text_tuples(rows: Any, columns: Sequence[str], settings: FisherSettings) -> list[tuple[str, ...]]:
    """Several columns of text, row by row."""
    return list(zip(*(texts(rows, column, settings) for column in columns), strict=True))


def check_count(columns: Sequence[str], most: int, task: str) -> None:
    """Refuse more text columns than a task reads.

    Raises:
        DataError: Says how many were named.
    """
    if len(columns) > most:
        raise DataError(
            f"{task} reads {most} text column{'s' * (most > 1)} at most, text names {len(columns)}"
        )
