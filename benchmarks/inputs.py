"""What the benchmark works on: checkpoints of one shape, text to measure on, and their sidecars.

    python benchmarks/inputs.py WORK [--checkpoint FOLDER] [--data FILE] [--samples N] [--config JSON] [--gib N]
                                [--models M] [--mask M] [--diagonal M] [--device D]

Makes WORK/model1 to WORK/modelM and, where no data is given, WORK/data.jsonl. The given checkpoint is linked,
never written to. Prints a line of JSON.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.settings import FisherSettings, Kind
from fisher_mask_mergekit.store import FACTORED_BESIDE

VOCABULARY = 30522
WORDS = (8, 56)
"""Fewest and most words of a made-up sample."""

NOISE = 0.01
"""The other checkpoints are the first plus noise of this share of each tensor's standard deviation."""

SHARDS = 4
"""Files, about, of a checkpoint whose size was asked for; its weights are bfloat16."""


def bert_config(changes: Mapping[str, Any], gib: float | None) -> BertConfig:
    """BERT-base's shape, changed; or, for a wanted size of bfloat16 weights, wider and as deep as it takes."""
    wider: dict[str, Any] = {}
    if gib is not None:
        hidden = 2048
        per_layer = 12 * hidden**2
        layers = round((gib * 2**30 / 2 - VOCABULARY * hidden) / per_layer)
        wider = {
            "hidden_size": hidden,
            "num_attention_heads": 32,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": max(1, layers),
        }
    return BertConfig(**{"vocab_size": VOCABULARY, "num_labels": 2, **wider, **changes})


def random_classifier(folder: Path, changes: Mapping[str, Any], gib: float | None) -> None:
    """A complete BERT classifier with random weights and a word-level tokenizer."""
    torch.manual_seed(0)
    dtype = torch.float32 if gib is None else torch.bfloat16
    config = bert_config(changes, gib)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype)
    save(model, folder, gib)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{index}" for index in range(len(special), config.vocab_size)]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip


def link(checkpoint: Path, folder: Path) -> None:
    """The checkpoint's files under another folder, so that a sidecar beside it is not written to the original."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())


def save(model: Any, folder: Path, gib: float | None) -> None:
    model.save_pretrained(folder, max_shard_size="50GB" if gib is None else int(gib * 2**30 / SHARDS))


def perturbed_copy(source: Path, folder: Path, seed: int, gib: float | None) -> None:
    """A checkpoint of the same shape and dtype with other values."""
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype="auto")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_((noise * NOISE * parameter.float().std(correction=0)).to(parameter.dtype))
    save(model, folder, gib)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def random_text(path: Path, checkpoint: Path, rows: int) -> None:
    """Random tokens of the checkpoint's vocabulary, and random labels."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    labels = AutoConfig.from_pretrained(checkpoint).num_labels
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(len(tokenizer)) if index not in special]
    generator = numpy.random.default_rng(0)
    lines = []
    for _ in range(rows):
        ids = generator.choice(ordinary, size=generator.integers(*WORDS, endpoint=True))
        row = {"text": tokenizer.decode(ids.tolist()), "label": int(generator.integers(labels))}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--config", type=json.loads, default={}, help="changes of BERT-base's configuration")
    parser.add_argument("--gib", type=float)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--mask", type=int, default=0, help="how many of them get a sidecar of mask nodes")
    parser.add_argument("--factored", type=int, default=0, help="how many get one of rows and columns")
    parser.add_argument("--diagonal", type=int, default=0, help="how many get one of every parameter")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    logging.disable_progress_bar()
    first, *others = folders = [options.work / f"model{number}" for number in range(1, options.models + 1)]
    if options.checkpoint is None:
        random_classifier(first, options.config, options.gib)
    else:
        link(options.checkpoint, first)
    for seed, folder in enumerate(others, 1):
        perturbed_copy(first, folder, seed, options.gib)
    data = options.data
    if data is None:
        data = options.work / "data.jsonl"
        random_text(data, first, options.samples)
    device = pick_device(None if options.device == "auto" else options.device)
    wanted: dict[Kind, int] = {
        "mask": options.mask,
        "factored": options.factored,
        "diagonal": options.diagonal,
    }
    for kind, count in wanted.items():
        settings = FisherSettings(data=str(data.resolve()), samples=options.samples, kind=kind)
        for folder in folders[:count]:
            compute(prepare(str(folder), settings), device)
    files = folders[-1].glob("*.safetensors")
    sizes = [value.nbytes for file in files for value in load_file(file).values()]
    made: dict[str, Any] = {"data": str(data), "models": [str(folder) for folder in folders]}
    made |= {"bytes": sum(sizes), "largest": max(sizes)}
    if options.factored:
        made["factored_sidecar"] = (first / FACTORED_BESIDE).stat().st_size
    print(json.dumps(made))


if __name__ == "__main__":
    main()
