"""How long a sample may be, by what its checkpoint can take."""

from typing import Any

import pytest

from fisher_mask_mergekit.loading import longest
from fisher_mask_mergekit.settings import FisherSettings
from tests import tiny, tiny_tasks


def allowed(model: Any, tokenizer_limit: int = 10**30, **settings: Any) -> int:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = tokenizer_limit
    return longest(model, tokenizer, FisherSettings(**settings))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("bert-tokens", 40),
        ("roberta-masked", 39),  # One position is the padding's, which is number 0 here.
        ("gpt2-causal", 40),
        ("bart-seq2seq", 40),
        ("llama-causal", 40),
        ("t5-seq2seq", 512),  # Relative positions have no end: the default.
    ],
)
def test_no_more_than_the_checkpoint_can_take(name: str, limit: int) -> None:
    model = tiny_tasks.model(name)
    assert allowed(model) == limit
    assert allowed(model, max_length=1000) == (1000 if limit == 512 else limit)
    assert allowed(model, max_length=9) == 9
    assert allowed(model, tokenizer_limit=7) == 7
