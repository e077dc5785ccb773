"""A small BERT from bundled text alone: tokenizer, masked-LM training, fine-tuning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fisher_mask_mergekit.demo.sizes import SEED, Sizes

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MASKED_SHARE = 0.15
_DROPOUT = 0.1


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
    """A lower-cased WordPiece tokenizer of the given texts; the same one every time."""
    first = _tokenizer({"[UNK]": 0})
    letters = sorted({letter for text in texts for letter in first.normalizer.normalize_str(text)} - {" "})
    # Left to itself, the trainer numbers the pieces of one letter in the order of a hash table, and ties
    # between frequent pairs go by number: each run would have another vocabulary.
    fixed = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    first.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=sizes.vocabulary, special_tokens=fixed, show_progress=False),
    )
    tokenizer = _tokenizer(first.get_vocab())
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{name[1:-1].lower()}_token": name for name in _SPECIAL}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=sizes.max_length, **names
    )


def _tokenizer(vocabulary: dict[str, int]) -> Any:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


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
        # So few passes fit nothing too closely; without dropout they get further, and take less time.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config)
    encoded = _encode(texts, tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)

    def loss(index: Sequence[int]) -> Tensor:
        batch = tokenizer.pad([encoded[i] for i in index], return_tensors="pt")
        ids = batch.pop("input_ids")
        hidden = ~torch.isin(ids, special) & (torch.rand(ids.shape) < _MASKED_SHARE)
        # An eighth of them stays as it is: the model must also represent words it can see.
        shown = torch.where(hidden & (torch.rand(ids.shape) < 7 / 8), tokenizer.mask_token_id, ids)
        states = model.bert(shown, **batch).last_hidden_state
        # The vocabulary's logits only where they are asked for: a quarter of the time is saved.
        total = cross_entropy(model.cls(states[hidden]), ids[hidden], reduction="sum")
        return total / hidden.sum().clamp(min=1)

    losses = _train(
        model, loss, _lengths(encoded), sizes.batch_size, sizes.pretraining_epochs, sizes.pretraining_rate
    )
    _save(model, tokenizer, folder)
    return losses[0], losses[-1]


def save_as_classifier(parent: Path, folder: Path) -> None:
    """Write the pretrained BERT as a model of the class of those that are fine-tuned from it."""
    torch.manual_seed(SEED)
    transformers.BertForSequenceClassification.from_pretrained(parent).save_pretrained(folder)


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
        parent,
        num_labels=len(labels),
        label2id=label2id,
        id2label=dict(enumerate(labels)),
        hidden_dropout_prob=_DROPOUT,
        attention_probs_dropout_prob=_DROPOUT,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent)
    encoded = _encode(rows.texts, tokenizer)
    targets = torch.tensor([label2id[name] for name in rows.labels])

    def loss(index: Sequence[int]) -> Tensor:
        batch = tokenizer.pad([encoded[i] for i in index], return_tensors="pt")
        return cross_entropy(model(**batch).logits, targets[index])

    _train(model, loss, _lengths(encoded), sizes.batch_size, sizes.fine_tuning_epochs, sizes.fine_tuning_rate)
    _save(model, tokenizer, folder)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    encoded = tokenizer(list(texts), truncation=True)
    return [
        {name: encoded[name][index] for name in ("input_ids", "attention_mask")}
        for index in range(len(texts))
    ]


def _lengths(encoded: Sequence[Mapping[str, Sequence[int]]]) -> list[int]:
    return [len(row["input_ids"]) for row in encoded]


def _train(
    model: nn.Module,
    loss_of: Callable[[Sequence[int]], Tensor],
    lengths: Sequence[int],
    batch_size: int,
    epochs: int,
    rate: float,
) -> list[float]:
    """Train with AdamW, a warm-up and linear decay; the mean loss of each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(lengths) // batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = numpy.random.default_rng(SEED)
    model.train()
    means = []
    for _ in range(epochs):
        losses = []
        for index in _batches(lengths, batch_size, generator):
            loss = loss_of(index)
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
