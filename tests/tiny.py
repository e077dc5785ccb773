"""Tiny classifiers made on the spot: one of every architecture that the table of sites was checked on."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.skeleton import sites_of as sites_of_model
from fisher_mask_mergekit.tasks import Batch, SequenceClassification

VOCABULARY = 64
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "bert": (BertConfig, _ENCODER),
    "roberta": (RobertaConfig, _ENCODER),
    "xlm-roberta": (XLMRobertaConfig, _ENCODER),
    "distilbert": (
        DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
         "max_position_embeddings": 40, "pad_token_id": 0},
    ),
    "electra": (ElectraConfig, _ENCODER | {"embedding_size": 16}),
    "llama": (LlamaConfig, _DECODER | {"attention_bias": False}),
    "qwen2": (Qwen2Config, _DECODER),
    "mistral": (MistralConfig, _DECODER | {"head_dim": 12}),
}  # fmt: skip
ARCHITECTURES = tuple(CONFIGS)
TASK = SequenceClassification()


def config_of(architecture: str, labels: int = 3, **changes: Any) -> Any:
    kind, values = CONFIGS[architecture]
    return kind(**values | {"num_labels": labels} | changes)


def classifier(architecture: str, labels: int = 3, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random classifier with every parameter perturbed, so that biases and norms count too."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config_of(architecture, labels, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sites_of(model: PreTrainedModel) -> tuple[Site, ...]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return sites_of_model(model, shapes)


def samples(count: int = 7, labels: int = 3, seed: int = 0) -> list[tuple[Tensor, int]]:
    """Token ids of unequal length, and a label."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 14, (count,), generator=generator).tolist()
    return [
        (
            torch.randint(5, VOCABULARY, (length,), generator=generator),
            int(torch.randint(0, labels, (1,), generator=generator)),
        )
        for length in lengths
    ]


def batches(
    drawn: list[tuple[Tensor, int]],
    size: int,
    extra_padding: int = 0,
    pad: int = 0,
    index: list[int] | None = None,
) -> list[Batch]:
    """Right-padded batches, in the order given."""
    index = list(range(len(drawn))) if index is None else index
    made = []
    for start in range(0, len(drawn), size):
        part = drawn[start : start + size]
        width = max(len(ids) for ids, _ in part) + extra_padding
        ids = torch.full((len(part), width), pad)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, (tokens, _) in enumerate(part):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        labels = torch.tensor([label for _, label in part])
        made.append(
            Batch({"input_ids": ids, "attention_mask": mask}, labels, tuple(index[start : start + size]))
        )
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: 'w5' to 'w63' are words, the first five ids are special."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {name: index for index, name in enumerate(special)}
    vocabulary |= {f"w{index}": index for index in range(len(special), VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A complete checkpoint."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def checkpoint(
    folder: Path, architecture: str = "bert", labels: int = 2, seed: int = 0, **changes: Any
) -> Path:
    return save(classifier(architecture, labels, seed, **changes), folder)


def sibling(folder: Path, parent: Path, seed: int, labels: int = 2) -> Path:
    """A checkpoint 'fine-tuned' from another: the same weights, a little moved, and a head of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(
        parent, num_labels=labels, ignore_mismatched_sizes=True
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return save(model, folder)


def write_data(path: Path, rows: int = 24, labels: int = 2, seed: int = 0) -> Path:
    """A .jsonl with columns text and label."""
    import json

    generator = torch.Generator().manual_seed(seed)
    lines = []
    for row in range(rows):
        length = int(torch.randint(2, 12, (1,), generator=generator))
        words = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words), "label": row % labels}))
    path.write_text("\n".join(lines) + "\n")
    return path
