"""A small BERT from bundled text alone: tokenizer, masked-LM training, fine-tuning, evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

SEED = 0
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MASKED_SHARE = 0.15
_IGNORED = -100  # What transformers' loss leaves out.


@dataclass(frozen=True)
class Sizes:
    """How large the demo is. Chosen by the fine-tuned models' accuracy and the time taken.

    Attributes:
        vocabulary: Word pieces at most.
        layers: L.
        hidden: Width of the encoder.
        heads: H per layer.
        neurons: D per layer.
        max_length: Tokens per text at most.
        batch_size: Texts per training step.
        pretraining_epochs: Passes of the masked-LM training over both tasks' training texts.
        pretraining_rate: Its highest learning rate.
        fine_tuning_epochs: Passes over a task's training rows.
        fine_tuning_rate: Its highest learning rate.
        train_rows: Training rows per task at most; None for all.
        held_out_rows: Held-out rows per task at most; None for all.
    """

    vocabulary: int = 2000
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    neurons: int = 512
    max_length: int = 48
    batch_size: int = 32
    pretraining_epochs: int = 15
    pretraining_rate: float = 1e-3
    fine_tuning_epochs: int = 6
    fine_tuning_rate: float = 5e-4
    train_rows: int | None = None
    held_out_rows: int | None = None


@dataclass(frozen=True)
class Rows:
    """Labelled texts.

    Attributes:
        texts: N texts.
        labels: N label names.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks, and with the random state as it was afterwards."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def train_tokenizer(texts: Sequence[str], sizes: Sizes) -> Any:
    """A lower-cased WordPiece tokenizer of the given texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=sizes.vocabulary, special_tokens=list(_SPECIAL), show_progress=False
        ),
    )
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{name[1:-1].lower()}_token": name for name in _SPECIAL}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=sizes.max_length, **names
    )


def pretrain(texts: Sequence[str], tokenizer: Any, sizes: Sizes, folder: Path) -> tuple[float, float]:
    """Train a new BERT to fill in masked word pieces, and write it with its tokenizer.

    Args:
        texts: Training texts, without labels.
        tokenizer: Theirs.
        sizes: Of the model and the training.
        folder: Where to write.

    Returns:
        Mean loss of the first and of the last epoch, in nats per masked word piece.
    """
    torch.manual_seed(SEED)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.neurons,
        max_position_embeddings=sizes.max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.BertForMaskedLM(config)
    encoded = _encode(texts, tokenizer)

    def mask(index: Sequence[int]) -> dict[str, Tensor]:
        batch = tokenizer.pad([encoded[i] for i in index], return_tensors="pt")
        ids = batch["input_ids"]
        words = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        hidden = words & (torch.rand(ids.shape) < _MASKED_SHARE)
        # An eighth of them stays as it is: the model must also represent words it can see.
        shown = torch.where(hidden & (torch.rand(ids.shape) < 7 / 8), tokenizer.mask_token_id, ids)
        return {
            **batch,
            "input_ids": shown,
            "labels": torch.where(hidden, ids, _IGNORED),
        }

    lengths = [len(row["input_ids"]) for row in encoded]
    losses = _train(model, mask, lengths, sizes.batch_size, sizes.pretraining_epochs, sizes.pretraining_rate)
    _save(model, tokenizer, folder)
    return losses[0], losses[-1]


def fine_tune(rows: Rows, labels: Sequence[str], parent: Path, sizes: Sizes, folder: Path) -> None:
    """Fine-tune the pretrained BERT into a classifier of the given labels, and write it.

    Args:
        rows: Training rows.
        labels: All label names of the task, in the order of their indices.
        parent: The pretrained checkpoint's folder.
        sizes: Of the training.
        folder: Where to write.
    """
    torch.manual_seed(SEED)
    label2id = {name: index for index, name in enumerate(labels)}
    model = transformers.BertForSequenceClassification.from_pretrained(
        parent, num_labels=len(labels), label2id=label2id, id2label=dict(enumerate(labels))
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent)
    encoded = _encode(rows.texts, tokenizer)
    targets = torch.tensor([label2id[name] for name in rows.labels])

    def batch(index: Sequence[int]) -> dict[str, Tensor]:
        padded = tokenizer.pad([encoded[i] for i in index], return_tensors="pt")
        return {**padded, "labels": targets[list(index)]}

    lengths = [len(row["input_ids"]) for row in encoded]
    _train(model, batch, lengths, sizes.batch_size, sizes.fine_tuning_epochs, sizes.fine_tuning_rate)
    _save(model, tokenizer, folder)


def correct(folder: Path, rows: Rows) -> numpy.ndarray:
    """Which rows a checkpoint classifies as labelled, ``[N]``, bool; labels are matched by name."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = _encode(rows.texts, tokenizer)
    targets = [model.config.label2id[name] for name in rows.labels]
    found: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(encoded), 64):
            batch = tokenizer.pad(encoded[start : start + 64], return_tensors="pt")
            found += model(**batch).logits.argmax(-1).tolist()
    return numpy.array(found) == numpy.array(targets)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    encoded = tokenizer(list(texts), truncation=True)
    return [
        {name: encoded[name][index] for name in ("input_ids", "attention_mask")}
        for index in range(len(texts))
    ]


def _train(
    model: nn.Module, batch: Any, lengths: Sequence[int], batch_size: int, epochs: int, rate: float
) -> list[float]:
    """Train with AdamW, a short warm-up and linear decay; the mean loss of each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(lengths) // batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = numpy.random.default_rng(SEED)
    model.train()
    means = []
    for _ in range(epochs):
        losses = []
        for index in _batches(lengths, batch_size, generator):
            loss = model(**batch(index)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means


def _batches(
    lengths: Sequence[int], batch_size: int, generator: numpy.random.Generator
) -> Iterator[list[int]]:
    """All rows once, in random batches of like length: half of the time would go into padding otherwise."""
    order = generator.permutation(len(lengths)).tolist()
    pool = 16 * batch_size
    sorted_pools = [
        sorted(order[start : start + pool], key=lambda i: lengths[i]) for start in range(0, len(order), pool)
    ]
    batches = [
        rows[start : start + batch_size] for rows in sorted_pools for start in range(0, len(rows), batch_size)
    ]
    for position in generator.permutation(len(batches)):
        yield batches[position]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
