"""How long a sample may be, by what its checkpoint can take; and what attention a model is loaded with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertForSequenceClassification

from fisher_mask_mergekit.checkpoint import locate
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.loading import load_model, longest
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attention_is_torchs_own_in_every_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.checkpoint(tmp_path / "model", labels=3)
    config = AutoConfig.from_pretrained(folder)
    model = load_model(locate(str(folder)), BertForSequenceClassification, config, tiny.tokenizer(), dtype)
    attention, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        dtypes.append(query.dtype)
        return attention(query, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    mask_fisher(model, tiny.batches(tiny.samples(2), 2), tiny.sites_of(model), tiny.TASK)
    assert set(dtypes) == {dtype}
