"""What a model said of every sample, beside what was right: all metrics are computed from this."""

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import torch
from torch import nn

from fisher_mask_mergekit.evaluation.answers import AnswerTexts
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.tasks import (
    Batch,
    Categorical,
    Gaussian,
    Likelihood,
    MultiLabelClassification,
    Task,
)

Array = numpy.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Predictions:
    """P predictions of N samples.

    Attributes:
        count: N, with the samples of which nothing was predicted.
        owner: ``[P]``, which sample a prediction belongs to, in ascending order.
        predicted: ``[P]`` classes, tokens or texts; ``[P, K]`` labels (0 or 1) or values.
        reference: The same from the data; of texts, JSON lists of all that are right.
        nll: ``[P]``, each prediction's loss in nats; empty where it has none.
        truncated: How many samples were longer than they may be.
    """

    count: int
    owner: Array
    predicted: Array
    reference: Array
    nll: Array
    truncated: int = 0


def predict(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    samples: Sequence[tuple[Any, Any]],
    *,
    truncated: int = 0,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Predictions:
    """Run a model on all samples.

    Args:
        model: In evaluation mode.
        task: What it predicts.
        batches: Of the samples.
        samples: What the task read of each: text and label.
        truncated: How many of them were cut.
        on_batch: Called after every batch.
    """
    may_be_none = any(label == [] for _, label in samples) if isinstance(task, AnswerTexts) else False
    parts = []
    with torch.no_grad():
        for batch in batches:
            if isinstance(task, AnswerTexts):
                texts = [
                    samples[index][0][1][begin:end]
                    for index, (begin, end) in zip(
                        batch.index, task.spans(model, batch, may_be_none), strict=True
                    )
                ]
                wanted = [json.dumps(samples[index][1]) for index in batch.index]
                parts.append((batch.index, numpy.array(texts), numpy.array(wanted), numpy.empty(0)))
            else:
                parts.append(_of(task.likelihood(model, batch), task))
            on_batch(batch)
    owner, predicted, reference, nll = (
        numpy.concatenate([numpy.asarray(part[place]) for part in parts]) for place in range(4)
    )
    order = numpy.argsort(owner, kind="stable")
    kept = nll[order] if len(nll) else nll
    return Predictions(len(samples), owner[order], predicted[order], reference[order], kept, truncated)


def _of(likelihood: Likelihood, task: Task) -> tuple[Any, Array, Array, Array]:
    """Owner, prediction, reference and loss of one batch's predictions."""
    if isinstance(likelihood, Gaussian):
        means, targets = likelihood.means.double().cpu(), likelihood.targets.double().cpu()
        return likelihood.index, means.numpy(), targets.numpy(), numpy.empty(0)
    assert isinstance(likelihood, Categorical)
    predicted, targets = likelihood.log_probs.argmax(-1).cpu(), likelihood.targets.cpu()
    if isinstance(task, MultiLabelClassification):
        shape = (len(likelihood.index), -1)
        return likelihood.index, predicted.view(shape).numpy(), targets.view(shape).numpy(), numpy.empty(0)
    nll = -likelihood.log_probs.gather(1, likelihood.targets[:, None])[:, 0].double().cpu()
    owner = numpy.asarray(likelihood.index)[likelihood.owner.cpu().numpy()]
    return owner, predicted.numpy(), targets.numpy(), nll.numpy()


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write to a file, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    values = {field.name: getattr(predictions, field.name) for field in fields(Predictions)}
    content = BytesIO()
    numpy.savez_compressed(content, **values)
    write_whole(path, content.getvalue())


def load_predictions(path: Path) -> Predictions | None:
    """From a file; None if there is none that can be read."""
    try:
        with numpy.load(path, allow_pickle=False) as stored:
            values = {field.name: stored[field.name] for field in fields(Predictions)}
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile, zlib.error):
        return None
    return Predictions(**values | {name: int(values[name]) for name in ("count", "truncated")})
