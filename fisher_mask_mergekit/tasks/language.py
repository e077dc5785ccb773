"""Tasks that predict text: masked tokens, the next token, or another text."""

from dataclasses import dataclass
from typing import Any

import numpy
from torch import nn

from fisher_mask_mergekit.columns import Layout, check_count, find_columns, text_tuples, texts
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks.chat import as_messages, split_chat
from fisher_mask_mergekit.tasks.likelihood import IGNORED, Batch, Likelihood, padded_right
from fisher_mask_mergekit.tasks.task import Drawn, Encoded, Task, Tokenization
from fisher_mask_mergekit.tasks.tokens import token_likelihood

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class MaskedLM(Task):
    """What stood at masked tokens: 15 % of a sample's tokens, special ones aside, at least one.

    Of those, 80 % are replaced by the mask token, 10 % by any token, 10 % stay. All is drawn by the seed and the
    sample's index.
    """

    name = "masked-lm"
    layouts = (Layout(("text",), None), Layout(("sentence",), None), Layout(("content",), None))

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """One column of text."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        check_count(columns.text, 1, self.name)
        drawn = text_tuples(rows, columns.text, settings)
        return Drawn(drawn, [None] * len(drawn), columns, {}, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """The text with its masks; None if there is nothing to mask."""
        if how.tokenizer.mask_token_id is None:
            raise CheckpointError(
                "the checkpoint's tokenizer has no mask token, so its loss is no masked LM's"
            )
        inputs, truncated = how.encode(*text, return_special_tokens_mask=True)
        special = inputs.pop("special_tokens_mask")
        plain = [place for place, is_special in enumerate(special) if not is_special]
        if not plain:
            return None
        ids, labels = list(inputs["input_ids"]), [IGNORED] * len(special)
        # The 1 keeps this apart from the labels drawn from the model by the same seed and index.
        generator = numpy.random.default_rng([how.seed, index, 1])
        count = max(1, round(MASKED_SHARE * len(plain)))
        chosen = generator.choice(plain, count, replace=False).tolist()
        tokens = generator.integers(how.tokenizer.vocab_size, size=count).tolist()
        for place, draw, token in zip(chosen, generator.random(count), tokens, strict=True):
            labels[place] = ids[place]
            if draw < 0.9:
                ids[place] = how.tokenizer.mask_token_id if draw < 0.8 else token
        return Encoded(dict(inputs) | {"input_ids": ids}, labels, truncated)

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the tokens that were masked."""
        batch = batch.padded_right(labels_too=True)
        output = model(**batch.inputs)
        # Classes for pre-training have a second head, and another name for this one.
        logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
        return token_likelihood(logits, batch.labels, self.loss, batch.index)


@dataclass(frozen=True)
class CausalLM(Task):
    """The next token: of a whole text, of a completion behind its prompt, or of a chat's last answer."""

    name = "causal-lm"
    layouts = (
        Layout(("messages",), None),
        Layout(("prompt",), "completion"),
        Layout(("prompt",), "response"),
        Layout(("text",), None),
        Layout(("content",), None),
    )

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """A column of texts or of chats, or a prompt's and a completion's."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        check_count(columns.text, 1, self.name)
        values = list(rows[columns.text[0]])
        if columns.label is not None:
            drawn = text_tuples(rows, columns.text, settings)
            return Drawn(drawn, texts(rows, columns.label, settings), columns, {}, None)
        if columns.text == ("messages",) or any(isinstance(value, list) for value in values):
            chats = [as_messages(value, columns.text[0], settings) for value in values]
            return Drawn([chat[:-1] for chat in chats], [chat[-1] for chat in chats], columns, {}, None)
        return Drawn(text_tuples(rows, columns.text, settings), [None] * len(values), columns, {}, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """The tokens; None if there is nothing to predict."""
        tokenizer = how.tokenizer
        if label is None:
            inputs, truncated = how.encode(*text)
            ids, labels = list(inputs["input_ids"]), list(inputs["input_ids"])
        else:
            if isinstance(label, str):
                before = _without_end(tokenizer(*text, return_special_tokens_mask=True, verbose=False))
                after = tokenizer(label, add_special_tokens=False, verbose=False)["input_ids"]
                if tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
                    after = [*after, tokenizer.eos_token_id]
            else:
                before, after = (
                    tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                    for part in split_chat([*text, label], tokenizer)
                )
            truncated = len(before) + len(after) > how.max_length
            before, after = _fitted(before, after, how.max_length, tokenizer.bos_token_id)
            ids, labels = before + after, [IGNORED] * len(before) + after
        if all(one == IGNORED for one in labels[1:]):
            return None
        return Encoded({"input_ids": ids, "attention_mask": [1] * len(ids)}, labels, truncated)

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of every token under what the model says at the one before it."""
        batch = batch.padded_right(labels_too=True)
        logits = model(**batch.inputs).logits
        return token_likelihood(logits[:, :-1], batch.labels[:, 1:], self.loss, batch.index)


def _without_end(encoded: Any) -> list[int]:
    """A prompt's tokens without the special ones that would end the text."""
    ids, special = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    while ids and special[len(ids) - 1] and not all(special[: len(ids)]):
        ids.pop()
    return ids


def _fitted(
    before: list[int], after: list[int], longest: int, bos: int | None
) -> tuple[list[int], list[int]]:
    """A prompt and a completion cut to length: first the prompt's beginning, then the completion's end.

    One token of the prompt stays: that which begins every text, where there is one.
    """
    kept = int(before[:1] == [bos])
    excess = max(0, min(len(before) + len(after) - longest, len(before) - 1))
    before = before[:kept] + before[kept + excess :]
    return before, after[: max(0, longest - len(before))]


@dataclass(frozen=True)
class Seq2SeqLM(Task):
    """Every token of a target text, given a source text and the target so far.

    Labels are ``[B, T]`` of the target; the model makes its decoder's inputs of them.
    """

    name = "seq2seq-lm"
    layouts = (
        Layout(("document",), "summary"),
        Layout(("article",), "highlights"),
        Layout(("dialogue",), "summary"),
        Layout(("source",), "target"),
        Layout(("input",), "output"),
        Layout(("question",), "answer"),
        Layout(("prompt",), "completion"),
        Layout(("text",), "summary"),
        Layout(("text",), "target"),
        Layout(("text",), "label"),
    )

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """A column of source texts and one of target texts."""
        columns = find_columns(rows.column_names, self.layouts, settings)
        check_count(columns.text, 1, self.name)
        drawn = text_tuples(rows, columns.text, settings)
        return Drawn(drawn, texts(rows, columns.label or "", settings), columns, {}, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded | None:
        """Source and target, each truncated by itself; None if either has no tokens."""
        source, cut = how.encode(*text)
        target, target_cut = how.encode(text_target=label)
        if not source["input_ids"] or not target["input_ids"]:
            return None
        inputs = {name: source[name] for name in ("input_ids", "attention_mask")}
        return Encoded(inputs, list(target["input_ids"]), cut or target_cut)

    def likelihood(self, model: nn.Module, batch: Batch) -> Likelihood:
        """Of the target's tokens."""
        batch = batch.padded_right()
        labels = padded_right(batch.labels, batch.labels != IGNORED)
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        # Classes without a way to ask shift labels that they are given.
        target = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        logits = model(**batch.inputs, **target).logits
        return token_likelihood(logits, labels, self.loss, batch.index)
