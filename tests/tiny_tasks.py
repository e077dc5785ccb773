"""Tiny models with every head that is measured, and samples for them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertForQuestionAnswering,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import BertForPreTraining as BertWithTwoHeads

from fisher_mask_mergekit.batches import Limit, padded_batches
from fisher_mask_mergekit.encoding import EncodedSamples
from fisher_mask_mergekit.tasks import IGNORED, Batch, Encoded
from tests import tiny

_SMALL = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "pad_token_id": 0, "eos_token_id": 3}
_BART = _SMALL | {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40, "bos_token_id": 2,
    "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "bert-tokens": (BertForTokenClassification, "bert"),
    "distilbert-tokens": (DistilBertForTokenClassification, "distilbert"),
    "llama-tokens": (LlamaForTokenClassification, "llama"),
    "bert-answers": (BertForQuestionAnswering, "bert"),
    "distilbert-answers": (DistilBertForQuestionAnswering, "distilbert"),
    "bert-choices": (BertForMultipleChoice, "bert"),
    "bert-masked": (BertForMaskedLM, "bert"),
    "bert-pretraining": (BertWithTwoHeads, "bert"),
    "roberta-masked": (RobertaForMaskedLM, "roberta"),
    "roberta-sequences": (RobertaForSequenceClassification, "roberta"),
    "llama-causal": (LlamaForCausalLM, "llama"),
    "gpt2-causal": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40, n_inner=48,
                   bos_token_id=2, eos_token_id=3, pad_token_id=0),
    ),
    "t5-seq2seq": (
        T5ForConditionalGeneration,
        T5Config(**_SMALL, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart-seq2seq": (BartForConditionalGeneration, BartConfig(**_BART)),
    # A class that has no prepare_decoder_input_ids_from_labels.
    "m2m100-seq2seq": (M2M100ForConditionalGeneration, M2M100Config(**_BART)),
}  # fmt: skip


def model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """In float64 and evaluation mode, every parameter perturbed, so that biases and norms count too."""
    kind, config = MODELS[name]
    if isinstance(config, str):
        config = tiny.config_of(config, **{"labels": 2 if name.endswith("answers") else 3} | changes)
    torch.manual_seed(seed)
    made = kind(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.double().eval()


@dataclass
class Draw:
    """Random numbers for samples."""

    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self._generator))

    def ids(self, length: int) -> list[int]:
        return [self.number(5, tiny.VOCABULARY) for _ in range(length)]


def sample(ids: Any, labels: Any) -> Encoded:
    inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if isinstance(ids[0], list):
        inputs["attention_mask"] = [[1] * len(row) for row in ids]
    return Encoded(inputs, labels, truncated=False)


def samples(task: str, count: int = 7) -> list[Encoded]:
    """Samples of unequal length, as the task encodes them."""
    draw = Draw()
    made = []
    for _ in range(count):
        length = draw.number(4, 14)
        ids = draw.ids(length)
        if task == "choices":
            choices = [draw.ids(draw.number(4, 9)) for _ in range(3)]
            width = max(map(len, choices))
            inputs = {
                "input_ids": [row + [0] * (width - len(row)) for row in choices],
                "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in choices],
            }
            made.append(Encoded(inputs, draw.number(0, 3), truncated=False))
        elif task == "answers":
            begin = draw.number(0, length)
            made.append(sample(ids, [begin, draw.number(begin, length)]))
        elif task == "tokens":
            labels = [draw.number(0, 3) if draw.number(0, 3) else IGNORED for _ in ids]
            made.append(sample(ids, [*labels[:-1], draw.number(0, 3)]))
        elif task in ("masked", "pretraining"):
            labels = [one if draw.number(0, 3) == 0 else IGNORED for one in ids]
            made.append(
                sample(
                    [4 if one != IGNORED else i for one, i in zip(labels, ids, strict=True)],
                    [*labels[:-1], ids[-1]],
                )
            )
        elif task == "causal":
            prompt = draw.number(0, length - 1)
            made.append(sample(ids, [IGNORED] * prompt + ids[prompt:]))
        else:
            made.append(sample(ids, [*draw.ids(draw.number(2, 9)), 3]))
    return made


def own_loss(model: Any, encoded: Encoded) -> Tensor:
    """The loss that transformers itself gives for one sample, without padding."""
    ((inputs, labels),) = [(batch.inputs, batch.labels) for batch in batches([encoded], 1)]
    if model.config.problem_type == "multi_label_classification":
        labels = labels.double()
    if "QuestionAnswering" in type(model).__name__:
        return model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    if "PreTraining" in type(model).__name__:  # Its own loss has a second term.
        logits = model(**inputs).prediction_logits
        return cross_entropy(logits[0], labels[0], ignore_index=IGNORED)
    output = model(**inputs, labels=labels)
    if output.loss.dtype == torch.float64:
        return output.loss
    # Some losses of transformers are in float32 whatever the model is in: the same by hand.
    shift = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    logits, wanted = (output.logits[:, :-1], labels[:, 1:]) if shift else (output.logits, labels)
    own = cross_entropy(logits[0], wanted[0], ignore_index=IGNORED)
    assert_close(own.detach().float(), output.loss.detach())
    return own


def batches(
    encoded: list[Encoded], size: int, *, left: bool = False, order: list[int] | None = None
) -> list[Batch]:
    """Batches as the pre-pass makes them, or padded on the left."""
    order = order or list(range(len(encoded)))
    drawn = EncodedSamples({index: encoded[index] for index in order}, 0, 0)
    made = padded_batches(
        drawn, tiny.tokenizer(), limits=Limit(rows=size), by_length=False, device=torch.device("cpu")
    )
    return [_left(batch) if left else batch for batch in made]


def _left(batch: Batch) -> Batch:
    """The same with padding on the left, labels per token too."""
    mask = batch.inputs["attention_mask"]
    per_token = batch.labels.shape == mask.shape and mask.ndim == 2 and batch.labels.shape[1] > 2
    inputs = {name: _moved(tensor, mask) for name, tensor in batch.inputs.items()}
    return Batch(inputs, _moved(batch.labels, mask) if per_token else batch.labels, batch.index)


def _moved(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    moved = tensor.clone()
    for place in (
        [(row,) for row in range(len(mask))]
        if mask.ndim == 2
        else [(row, choice) for row in range(mask.shape[0]) for choice in range(mask.shape[1])]
    ):
        moved[place] = tensor[place].roll(int((mask[place] == 0).sum()))
    return moved
