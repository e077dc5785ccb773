"""Tasks with one decision about a whole text: classes, several labels at once, values, choices."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    Layout,
    check_count,
    find_columns,
    find_text,
    layouts,
    text_tuples,
    texts,
)
from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.labels import label_map, match_labels, match_name
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks.likelihood import IGNORED, Batch, Categorical, Gaussian, Likelihood, wide
from fisher_mask_mergekit.tasks.task import Drawn, Encoded, Task, Tokenization

CHOICE_LAYOUTS = (
    Layout(("sent1", "sent2", "ending0", "ending1", "ending2", "ending3"), "label"),
    Layout(("question", "choice0", "choice1", "choice2", "choice3"), "label"),
    *layouts([("question", "choices")], ("answerKey", "label", "answer")),
)


@dataclass(frozen=True)
class _AboutText(Task):
    """A task about one text, or a pair."""

    name = "sequence-classification"
    layouts = layouts(TEXT_COLUMNS, LABEL_COLUMNS)
    label2id: Mapping[str, int] = field(default_factory=dict)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """The text, or both texts of a pair."""
        inputs, truncated = how.encode(*text)
        if not inputs["input_ids"]:
            raise DataError(f"a sample has no tokens: {text!r:.80}")
        return Encoded(dict(inputs), self.unknown if label is None else label, truncated)

    @property
    @abstractmethod
    def unknown(self) -> Any:
        """What stands for a label that the data does not have."""

    def _columns(self, rows: Any, settings: FisherSettings) -> Layout:
        """Without a label column only where none was named, and the model is asked what the labels are."""
        try:
            columns = find_columns(rows.column_names, self.layouts, settings)
        except DataError as error:
            if settings.label is not None or settings.label_map is not None:
                raise
            columns = find_text(rows.column_names, self.layouts, settings)
            if settings.labels == "data":
                raise DataError(f"{error}; only measuring can do without, with labels: sampled") from error
        check_count(columns.text, 2, self.name)
        return columns


def _unlabelled(rows: Any, columns: Layout, settings: FisherSettings) -> Drawn | None:
    """Texts of which nobody says what is to be predicted: without a label column, or with one of -1 or nothing alone.

    None if there are labels, or they are wanted.
    """
    blank = columns.label is None or all(value is None or value == -1 for value in rows[columns.label])
    if settings.labels == "data" or not blank:
        return None
    free = Layout(columns.text, None)
    return Drawn(text_tuples(rows, free.text, settings), [None] * len(rows), free, {}, None)


@dataclass(frozen=True)
class SequenceClassification(_AboutText):
    """One of C classes per text: one prediction."""

    @property
    def predicts_once(self) -> bool:
        """Yes: which class."""
        return True

    @property
    def unknown(self) -> Any:
        """No class."""
        return IGNORED

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """One or two columns of text and one of labels, matched to the checkpoint's."""
        columns = self._columns(rows, settings)
        if blank := _unlabelled(rows, columns, settings):
            return blank
        raw = list(rows[columns.label])
        if raw and isinstance(raw[0], list):
            raise DataError(
                f"'{settings.data}': column '{columns.label}' holds lists, but the checkpoint gives one label per text; "
                'if it is a multi-label classifier, its config.json must say "problem_type": "multi_label_classification"'
            )
        feature = rows.features[columns.label]
        mapping = match_labels(raw, feature, self.label2id, settings)
        return Drawn(
            text_tuples(rows, columns.text, settings),
            [mapping[value] for value in raw],
            columns,
            label_map(mapping, feature),
            max(raw.count(value) for value in set(raw)) / len(raw),
        )

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the classes."""
        batch = batch.padded_right()
        logits = model(**batch.inputs).logits
        owner = torch.arange(len(batch.index), device=logits.device)
        return Categorical.of(logits, batch.labels, owner, self.loss, batch.index)


@dataclass(frozen=True)
class MultiLabelClassification(_AboutText):
    """K labels per text, each there or not: K predictions of two outcomes."""

    @property
    def kind(self) -> str:
        """Which sequence classification it is."""
        return "multi-label-classification"

    @property
    def unknown(self) -> Any:
        """Neither 0 nor 1, for every label."""
        return [IGNORED] * len(self.label2id)

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """Labels in one column of lists, or a column of 0 and 1 for every label of the checkpoint."""
        own = self._own_columns(rows.column_names)
        if settings.label is None and own and not any(name in rows.column_names for name in LABEL_COLUMNS):
            columns = Layout(self._columns_of_text(rows, settings), None)
            vectors = [list(row) for row in zip(*(rows[name] for name in own), strict=True)]
            return Drawn(
                text_tuples(rows, columns.text, settings),
                self._vectors(vectors, "the labels' columns", settings),
                columns,
                {name: index for index, name in enumerate(own)},
                None,
            )
        columns = self._columns(rows, settings)
        if blank := _unlabelled(rows, columns, settings):
            return blank
        raw = list(rows[columns.label])
        feature = rows.features[columns.label]
        labels, mapping = self._lists(raw, columns.label or "", feature, settings)
        return Drawn(text_tuples(rows, columns.text, settings), labels, columns, mapping, None)

    def _own_columns(self, names: Sequence[str]) -> list[str]:
        """A column for every label of the checkpoint, in the labels' order; none if one is missing."""
        matched = {match_name(name, self.label2id): name for name in names}
        order = range(len(self.label2id))
        return [matched[index] for index in order] if all(index in matched for index in order) else []

    def _columns_of_text(self, rows: Any, settings: FisherSettings) -> tuple[str, ...]:
        found = find_text(rows.column_names, self.layouts, settings)
        check_count(found.text, 2, self.name)
        return found.text

    def _lists(
        self, raw: list[Any], column: str, feature: Any, settings: FisherSettings
    ) -> tuple[list[list[int]], dict[str, int]]:
        """A column of lists: a 0 or 1 for every label, or the labels that a text has."""
        for value in raw:
            if not isinstance(value, list):
                raise DataError(
                    f"'{settings.data}': column '{column}' holds {type(value).__name__}, expected lists: the labels "
                    f"that a text has, or a 0 or 1 for each of the {len(self.label2id)} labels"
                )
        named = hasattr(feature.feature, "names")
        flat = [entry for row in raw for entry in row]
        count = len(self.label2id)
        if not named and all(len(row) == count for row in raw) and all(entry in (0, 1) for entry in flat):
            return self._vectors(raw, f"column '{column}'", settings), {}
        mapping = match_labels(flat, feature.feature, self.label2id, settings)
        held = [{mapping[entry] for entry in row} for row in raw]
        vectors = [[int(index in row) for index in range(count)] for row in held]
        return vectors, label_map(mapping, feature.feature)

    def _vectors(self, raw: list[list[Any]], where: str, settings: FisherSettings) -> list[list[int]]:
        for row in raw:
            if any(entry not in (0, 1) for entry in row):
                raise DataError(f"'{settings.data}': {where} must hold 0 and 1, got {row!r:.80}")
        return [[int(entry) for entry in row] for row in raw]

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of every label by itself."""
        batch = batch.padded_right()
        logits = wide(model(**batch.inputs).logits)
        pairs = torch.stack([torch.zeros_like(logits), logits], -1).flatten(0, 1)
        owner = torch.arange(len(batch.index), device=logits.device).repeat_interleave(logits.shape[1])
        return Categorical.of(pairs, batch.labels.long().flatten(), owner, self.loss, batch.index)


@dataclass(frozen=True)
class Regression(_AboutText):
    """K real values per text.

    The loss is half of the squared error, which is the negative log-likelihood under a variance of 1;
    transformers' own loss has no half.
    """

    @property
    def kind(self) -> str:
        """Which sequence classification it is."""
        return "regression"

    @property
    def predicts_once(self) -> bool:
        """Where there is one value per text."""
        return len(self.label2id) < 2

    @property
    def unknown(self) -> Any:
        """No number."""
        return [math.nan] * max(1, len(self.label2id))

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """One column of numbers, or of lists of K numbers."""
        columns = self._columns(rows, settings)
        if blank := _unlabelled(rows, columns, settings):
            return blank
        raw = [value if isinstance(value, list) else [value] for value in rows[columns.label]]
        count = max(1, len(self.label2id))
        for row in raw:
            numbers = all(isinstance(entry, int | float) and math.isfinite(entry) for entry in row)
            if not numbers or len(row) != count:
                raise DataError(
                    f"'{settings.data}': column '{columns.label}' must hold {count} number{'s' * (count > 1)} per row, "
                    f"as many as the checkpoint gives, got {row!r:.80}"
                )
        values = [[float(entry) for entry in row] for row in raw]
        return Drawn(text_tuples(rows, columns.text, settings), values, columns, {}, None)

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the values."""
        batch = batch.padded_right()
        means = wide(model(**batch.inputs).logits)
        weight = 1 / means.shape[1] if self.loss == "mean" else 1.0
        targets = batch.labels.to(means.dtype).reshape(means.shape)
        return Gaussian(means, targets, weight, batch.index)


@dataclass(frozen=True)
class MultipleChoice(Task):
    """One of C texts per sample: one prediction. Inputs are ``[B, C, T]``."""

    name = "multiple-choice"
    layouts = CHOICE_LAYOUTS

    @property
    def predicts_once(self) -> bool:
        """Yes: which choice."""
        return True

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """A question and a list of choices, or a column per choice; and which is right."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        raw = list(rows[columns.label])
        if len(columns.text) == 2:
            first = texts(rows, columns.text[0], settings)
            lists = [_choices(value, columns.text[1], settings) for value in rows[columns.text[1]]]
            drawn = [(one, *choices) for one, (choices, _) in zip(first, lists, strict=True)]
            raw = [
                letters.index(value) if value in letters else value
                for value, (_, letters) in zip(raw, lists, strict=True)
            ]
        else:
            drawn = [_question(row, columns) for row in text_tuples(rows, columns.text, settings)]
        counts = {len(row) - 1 for row in drawn}
        if len(counts) > 1 or min(counts) < 2:
            raise DataError(
                f"'{settings.data}': every sample must have the same number of choices, at least 2; "
                f"there are {', '.join(map(str, sorted(counts)))}"
            )
        letters = {chr(ord("A") + index): index for index in range(min(counts))}
        mapping = match_labels(raw, rows.features[columns.label], letters, settings)
        names = label_map(mapping, rows.features[columns.label])
        return Drawn(drawn, [mapping[value] for value in raw], columns, names, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """Every choice behind the question, each by itself."""
        each = [how.encode(text[0], choice) for choice in text[1:]]
        inputs = {name: [one[name] for one, _ in each] for name in each[0][0]}
        return Encoded(inputs, label, any(truncated for _, truncated in each))

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the choices."""
        batch = batch.padded_right()
        logits: Tensor = model(**batch.inputs).logits
        owner = torch.arange(len(batch.index), device=logits.device)
        return Categorical.of(logits, batch.labels, owner, self.loss, batch.index)


def _question(row: tuple[str, ...], columns: Layout) -> tuple[str, ...]:
    """A question and its choices; SWAG's second sentence is the beginning of every choice."""
    if columns.text[:2] != ("sent1", "sent2"):
        return row
    return (row[0], *(f"{row[1]} {ending}".strip() for ending in row[2:]))


def _choices(value: Any, column: str, settings: FisherSettings) -> tuple[list[str], list[str]]:
    """A list of texts, or one under ``text`` beside the choices' names under ``label``; texts and names."""
    named = isinstance(value, Mapping)
    choices = value.get("text") if named else value
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"'{settings.data}': column '{column}' must hold lists of texts, got {value!r:.80}")
    return choices, list(value.get("label") or []) if named else []
