"""Question answering as it is scored: the text that a model points at, beside all answers that are right."""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks import IGNORED, Batch, Drawn, Encoded, QuestionAnswering, Tokenization

LONGEST_ANSWER = 30
"""Tokens of an answer at most, as in the SQuAD script of transformers."""


@dataclass(frozen=True)
class AnswerTexts(QuestionAnswering):
    """Which part of a context answers the question.

    A sample is kept also where its answer was cut off: then the model is wrong. Labels ``[B, 2 T]`` are the
    characters where each token of the context begins and ends, :data:`~fisher_mask_mergekit.tasks.IGNORED` for
    other tokens.
    """

    def read(self, rows: Any, settings: FisherSettings) -> Drawn:
        """As for measuring, but with all answers of a sample, none of them for a question without one."""
        drawn = super().read(rows, settings)
        answers = [list(dict.fromkeys(value["text"])) for value in rows[drawn.columns.label]]
        return Drawn(drawn.texts, answers, drawn.columns, {}, None)

    def encode(self, text: tuple[Any, ...], label: Any, index: int, how: Tokenization) -> Encoded:
        """Both texts, and where in the context its tokens stand."""
        inputs, offsets, context, truncated = self.tokens(text, how)
        places = [[IGNORED, IGNORED] for _ in offsets]
        for place in context:
            places[place] = list(offsets[place])
        return Encoded(inputs, [place for pair in places for place in pair], truncated)

    def spans(self, model: nn.Module, batch: Batch, may_be_none: bool) -> list[tuple[int, int]]:
        """First character and the one behind the last of the best answer, per sample; (0, 0) for none.

        The best has the largest sum of the logits of its beginning and its end, at most
        :data:`LONGEST_ANSWER` tokens apart. None is the answer where the first token's sum is larger, if the
        data has questions without one.
        """
        logits = self.logits(model, batch).double().cpu()
        characters = batch.labels.cpu().unflatten(1, (-1, 2))
        return [_best(*pair) for pair in zip(logits, characters, [may_be_none] * len(logits), strict=True)]


def _best(logits: Tensor, characters: Tensor, may_be_none: bool) -> tuple[int, int]:
    """Of one sample: logits ``[2, T]``, characters ``[T, 2]``."""
    width = min(logits.shape[1], len(characters))
    logits, characters = logits[:, :width], characters[:width]
    outside = characters[:, 0] == IGNORED
    begin, end = logits.masked_fill(outside, -torch.inf)
    sums = begin[:, None] + end[None]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    sums = sums.masked_fill(~allowed, -torch.inf)
    best = int(sums.argmax())
    if may_be_none and float(logits[:, 0].sum()) > float(sums.flatten()[best]):
        return 0, 0
    return int(characters[best // width, 0]), int(characters[best % width, 1])


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: in lower case, without punctuation, articles and superfluous space."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact(answer: str, references: str) -> float:
    """1 if an answer is one of those in a JSON list, as SQuAD compares them, else 0."""
    return float(normalised(answer) in {normalised(one) for one in _listed(references)})


def overlap(answer: str, references: str) -> float:
    """The largest F1 of an answer's words and those of an answer in a JSON list, as SQuAD defines it."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in _listed(references))


def _listed(references: str) -> Sequence[str]:
    """No answer is the empty one; the official script leaves out answers that normalise to nothing."""
    return [one for one in json.loads(references) if normalised(one)] or [""]


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))
