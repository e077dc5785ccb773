"""A plan in, scores out; what was run before on the same weights and samples is not run again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.batches import Limit, lacks_for_padding, padded_batches
from fisher_mask_mergekit.checkpoint import Checkpoint, read_tensors, side_files, tensor_shapes
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.evaluation.plan import Contender, Options, Plan, Subject
from fisher_mask_mergekit.evaluation.predictions import (
    Predictions,
    load_predictions,
    predict,
    save_predictions,
)
from fisher_mask_mergekit.evaluation.scores import Results, score_task
from fisher_mask_mergekit.execution import model_errors
from fisher_mask_mergekit.loading import load_model, load_tokenizer, longest
from fisher_mask_mergekit.store import alone, cache_folder, file_digest
from fisher_mask_mergekit.tasks import Tokenization

Progress = Callable[[str], AbstractContextManager[tuple[Callable[[int], None], Callable[[Any], None]]]]
"""Given a name, a context with what to call before the first batch (how many samples) and after every batch."""


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        results: The scores.
        runs: How many models were run; the others' predictions were there already.
        notes: What the user should know.
    """

    results: Results
    runs: int
    notes: tuple[str, ...]


def evaluate(
    plan: Plan,
    device: torch.device,
    progress: Progress,
    on_wait: Callable[[str], None] = lambda name: None,
    *,
    force: bool = False,
) -> Evaluation:
    """Run every model of a plan on its samples, unless that was done before, and score them.

    Of several processes that run the same, one does.

    Args:
        plan: What to run.
        device: Where.
        progress: Shows how far it is.
        on_wait: Called with a name before waiting for another process that runs the same.
        force: Run also what was run before.

    Raises:
        FisherMaskError: On bad input.
    """
    tasks, runs, notes = [], 0, []
    for subject, contenders in zip(plan.subjects, plan.contenders, strict=True):
        found = {}
        for contender in contenders:
            state = contender.state() if contender.state else None
            path = cache_folder() / "evaluations" / f"{_key(subject, contender, state)}.npz"
            name = f"{subject.name}, {contender.line}"
            with ExitStack() as stack:
                with suppress(OSError):  # Read-only: then what is not there is run, and not kept.
                    stack.enter_context(alone(path, partial(on_wait, name)))
                predictions = None if force else load_predictions(path)
                if predictions is None:
                    runs += 1
                    run = partial(run_contender, subject, contender, state, plan.options, device)
                    with progress(name) as (on_start, on_batch):
                        predictions = run(on_start=on_start, on_batch=on_batch)
                    try:
                        save_predictions(predictions, path)
                    except OSError as error:
                        notes.append(f"cannot keep the predictions in {path}: {error.strerror or error}")
            found[contender.line] = predictions
            notes += _notes(subject, contender, predictions)
        data = subject.settings.data or ""
        # The same rows are resampled alike, whichever model they are put to.
        seed = (plan.options.seed, int(subject.samples.record.digest[:16], 16))
        tasks.append(score_task(subject.name, subject.model.name, data, subject.metrics, found, seed))
    return Evaluation(Results(tasks, plan.merges), runs, tuple(dict.fromkeys(notes)))


def run_contender(
    subject: Subject,
    contender: Contender,
    state: dict[str, Tensor] | None,
    options: Options,
    device: torch.device,
    *,
    on_start: Callable[[int], None] = lambda samples: None,
    on_batch: Callable[[Any], None] = lambda batch: None,
) -> Predictions:
    """Run one model on a subject's samples, whether or not that was done before.

    Args:
        subject: Whose samples.
        contender: The model.
        state: Its weights, where they are not its checkpoint's.
        options: How.
        device: Where.
        on_start: Called with the number of samples before the first batch.
        on_batch: Called after every batch.

    Raises:
        FisherMaskError: If it cannot be loaded or run.
    """
    checkpoint, task, settings = contender.checkpoint, subject.task, subject.settings
    tokenizer = load_tokenizer(checkpoint, task, trust_remote_code=options.trust_remote_code)
    dtype = getattr(torch, settings.dtype)
    model: Any = load_model(checkpoint, contender.kind, contender.config, tokenizer, dtype, state)
    how = Tokenization(tokenizer, longest(model, tokenizer, settings), settings.seed)
    try:
        encoded = encode_samples(subject.samples, task, how)
    except CheckpointError as error:  # A task does not know what the checkpoint is called.
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    size = 1 if lacks_for_padding(tokenizer) else options.batch_size
    on_start(len(encoded.samples))
    samples = list(zip(subject.samples.texts, subject.samples.labels, strict=True))
    with model_errors(checkpoint.name, contender.kind, "--batch-size"):
        batches = padded_batches(encoded, tokenizer, limits=Limit(rows=size), by_length=True, device=device)
        return predict(
            model.to(device).eval(), task, batches, samples, truncated=encoded.truncated, on_batch=on_batch
        )


def _notes(subject: Subject, contender: Contender, predictions: Predictions) -> list[str]:
    notes = []
    left_out = predictions.count - len(set(predictions.owner.tolist()))
    where = f"{subject.name}: {{}} of {predictions.count} samples"
    if left_out:
        notes.append(f"{where.format(left_out)} held nothing to predict and were left out")
    if predictions.truncated:
        notes.append(f"{where.format(predictions.truncated)} were too long and were truncated")
    return notes


def _key(subject: Subject, contender: Contender, state: Mapping[str, Tensor] | None) -> str:
    """Of everything that the predictions depend on."""
    settings = subject.settings
    parts = checkpoint_parts(contender.checkpoint, state) | {
        "class": contender.kind.__name__,
        "task": subject.task.kind,
        "data": subject.samples.record.digest,
        "seed": settings.seed,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
    }
    # A merge in memory may bring a configuration of its own; any other is among the checkpoint's files.
    if contender.state is not None and contender.config is not subject.config:
        parts["config"] = json.loads(json.dumps(contender.config.to_dict(), default=str))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def checkpoint_parts(checkpoint: Checkpoint, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """What tells one model from another: all of its weights, the files beside them, and what runs it.

    Args:
        checkpoint: The model's files.
        state: Weights to take in place of the checkpoint's.
    """
    tensors: Iterable[tuple[str, Tensor]] = (
        state.items() if state is not None else read_tensors(checkpoint, tensor_shapes(checkpoint))
    )
    return {
        "versions": {name: version(name) for name in ("fisher-mask-mergekit", "torch", "transformers")},
        "weights": content_digest(tensors),
        "files": {file.name: file_digest(file) for file in sorted(side_files(checkpoint))},
    }


def content_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and all values, in order of their names."""
    lines = {}
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        lines[name] = f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(values).hexdigest()}\n"
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()
