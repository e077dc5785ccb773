"""Tasks that point at tokens of a given text: a tag for every word, or where an answer begins and ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.columns import Layout, check_count, find_columns, layouts, text_tuples
from fisher_mask_mergekit.errors import CheckpointError, DataError
from fisher_mask_mergekit.labels import label_map, match_labels
from fisher_mask_mergekit.settings import FisherSettings, Loss
from fisher_mask_mergekit.tasks.likelihood import IGNORED, Batch, Categorical, Likelihood
from fisher_mask_mergekit.tasks.task import Drawn, Encoded, Task, Tokenization

WORD_COLUMNS = (("tokens",), ("words",))
TAG_COLUMNS = ("ner_tags", "pos_tags", "tags", "labels")


def token_likelihood(logits: Tensor, labels: Tensor, loss: Loss, index: tuple[int, ...]) -> Categorical:
    """Of tokens ``[B, T]`` under logits ``[B, T, C]``, where the label is not :data:`IGNORED`."""
    predicted = labels != IGNORED
    owner = predicted.nonzero()[:, 0]
    return Categorical.of(logits[predicted], labels[predicted], owner, loss, index)


@dataclass(frozen=True)
class TokenClassification(Task):
    """A tag for every word: one prediction at the word's first token."""

    name = "token-classification"
    layouts = layouts(WORD_COLUMNS, TAG_COLUMNS)
    label2id: Mapping[str, int] = field(default_factory=dict)

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """A column of lists of words, and one of as long lists of tags; -100 is no tag."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        check_count(columns.text, 1, self.name)
        words, tags = list(rows[columns.text[0]]), list(rows[columns.label])
        for row, own in zip(words, tags, strict=True):
            if not isinstance(row, list) or not all(isinstance(word, str) for word in row):
                raise DataError(
                    f"'{settings.data}': column '{columns.text[0]}' must hold lists of words, got {row!r:.80}"
                )
            if not isinstance(own, list) or len(own) != len(row):
                raise DataError(
                    f"'{settings.data}': column '{columns.label}' must hold a tag for each of the {len(row)} words, "
                    f"got {own!r:.80}"
                )
        feature = rows.features[columns.label].feature
        given = [tag for own in tags for tag in own if tag != IGNORED]
        mapping = match_labels(given, feature, self.label2id, settings)
        drawn = [[IGNORED if tag == IGNORED else mapping[tag] for tag in own] for own in tags]
        return Drawn([tuple(row) for row in words], drawn, columns, label_map(mapping, feature), None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """The words; None if no word with a tag is left."""
        how.fast(self.name)
        inputs, truncated = how.encode(list(text), is_split_into_words=True)
        words = inputs.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words])]  # noqa: B905
        labels = [label[word] if begins else IGNORED for word, begins in zip(words, first, strict=True)]
        if all(one == IGNORED for one in labels):
            return None
        return Encoded(dict(inputs), labels, truncated)

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the tags."""
        batch = batch.padded_right(labels_too=True)
        return token_likelihood(model(**batch.inputs).logits, batch.labels, self.loss, batch.index)


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Where in a context the answer begins and ends: two predictions over the sample's own tokens.

    A question without an answer points at the first token. Labels ``[B, 2]`` count from a sample's first token.
    """

    name = "question-answering"
    layouts = (Layout(("question", "context"), "answers"),)

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """Question, context, and answers as in SQuAD; of several answers, the first."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        if len(columns.text) != 2:
            raise DataError(f"{self.name} reads a question and a context, text names {len(columns.text)}")
        drawn = text_tuples(rows, columns.text, settings)
        spans = [
            _span(answers, context, columns.label or "", settings)
            for answers, (_, context) in zip(rows[columns.label], drawn, strict=True)
        ]
        return Drawn(drawn, spans, columns, {}, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """Both texts, of which only the context is truncated; None if its answer was."""
        inputs, offsets, context, truncated = self.tokens(text, how)
        if label is None:
            return Encoded(inputs, [0, 0], truncated)
        begin, end = label
        answer = [place for place in context if offsets[place][0] < end and offsets[place][1] > begin]
        if not answer or offsets[context[-1]][1] < end:
            return None
        return Encoded(inputs, [answer[0], answer[-1]], truncated)

    def tokens(
        self, text: tuple[Any, ...], how: Tokenization
    ) -> tuple[dict[str, Any], list[tuple[int, int]], list[int], bool]:
        """Both texts as tokens: what the model takes, each token's characters, the context's tokens, whether cut.

        Raises:
            DataError: If the question leaves no room for its context.
        """
        tokenizer = how.fast(self.name)
        question = len(tokenizer(text[0], add_special_tokens=False)["input_ids"])
        if question + tokenizer.num_special_tokens_to_add(pair=True) >= how.max_length:
            raise DataError(
                f"the question {text[0]!r:.80} leaves no room for its context in max_length {how.max_length}"
            )
        inputs, truncated = how.encode(*text, truncation="only_second", return_offsets_mapping=True)
        offsets, parts = inputs.pop("offset_mapping"), inputs.sequence_ids()
        context = [place for place, part in enumerate(parts) if part == 1]
        return dict(inputs), offsets, context, truncated

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of beginning and end over a sample's tokens, ``[B, 2, T]``; padding cannot be either.

        Raises:
            CheckpointError: If the model gives none.
        """
        batch = batch.padded_right()
        output = model(**batch.inputs)
        if getattr(output, "start_logits", None) is None:
            raise CheckpointError(
                f"a {type(model).__name__} gives no logits of where an answer begins and ends"
            )
        logits = torch.stack([output.start_logits, output.end_logits], 1)
        mask = batch.inputs.get("attention_mask")
        if mask is not None:
            logits = logits.masked_fill(mask[:, None] == 0, -torch.inf)
        return logits

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of beginning and end."""
        logits = self.logits(model, batch)
        owner = torch.arange(len(batch.index), device=logits.device).repeat_interleave(2)
        return Categorical.of(logits.flatten(0, 1), batch.labels.flatten(), owner, self.loss, batch.index)


def _span(answers: Any, context: str, column: str, settings: FisherSettings) -> list[int] | None:
    """First character of an answer and the one behind its last; None if there is no answer."""
    try:
        texts, starts = answers["text"], answers["answer_start"]
        if not texts:
            return None
        text, start = texts[0], starts[0]
        right = bool(text) and context[start : start + len(text)] == text
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"'{settings.data}': column '{column}' must hold {{text: [...], answer_start: [...]}}, got {answers!r:.80}"
        ) from error
    if not right:
        raise DataError(
            f"'{settings.data}': answer_start {start} does not point at the answer {text!r:.80} in its context"
        )
    return [start, start + len(text)]
