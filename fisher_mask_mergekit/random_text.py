"""Texts of tokens drawn at random, for those who have no data."""

from dataclasses import dataclass
from typing import Any

import numpy

from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.settings import RANDOM, FisherSettings

TOKENS = 64
"""Of each text, before it is tokenised again."""

MOST_TEXTS = 1 << 20
"""A data set ends, these do not; and a sidecar from anyone may ask for them."""


@dataclass(frozen=True)
class Vocabulary:
    """What is drawn from.

    Attributes:
        tokenizer: The checkpoint's.
        rows: How many tokens its model has embeddings of.
    """

    tokenizer: Any
    rows: int

    def texts(self, settings: FisherSettings) -> list[str]:
        """Tokens drawn uniformly, special ones aside, as text; by the seed, a draw of its own for each sample.

        Raises:
            DataError: If there is nothing to draw, or more than :data:`MOST_TEXTS` texts are asked for.
        """
        if settings.samples > MOST_TEXTS:
            raise DataError(
                f"data '{RANDOM}': {settings.samples:,} samples are asked for; no more than {MOST_TEXTS:,} texts are drawn"
            )
        added = self.tokenizer.added_tokens_decoder.items()
        special = [*self.tokenizer.all_special_ids, *(index for index, token in added if token.special)]
        known = numpy.setdiff1d(numpy.arange(min(len(self.tokenizer), self.rows)), special)
        if not len(known):
            raise DataError(f"data '{RANDOM}': the checkpoint's tokenizer has no tokens but special ones")
        # The 2 keeps these apart from the labels drawn from the model, and the tokens masked, by the same seed and index.
        draws = (numpy.random.default_rng([settings.seed, index, 2]) for index in range(settings.samples))
        return [self.tokenizer.decode(draw.choice(known, TOKENS).tolist()) for draw in draws]
