"""A recipe and its merges looked into: all that can be wrong before a model is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import maxsize
from typing import Any

from torch import Tensor

from fisher_mask_mergekit.checkpoint import Checkpoint, locate, tensor_shapes
from fisher_mask_mergekit.data import Samples, load_samples, parse_spec
from fisher_mask_mergekit.errors import CheckpointError, DataError, RecipeError
from fisher_mask_mergekit.evaluation.answers import AnswerTexts
from fisher_mask_mergekit.evaluation.metrics import Metric, metrics_of
from fisher_mask_mergekit.evaluation.scores import OWN
from fisher_mask_mergekit.heads import Pooler, average_pooler, check_encoder, short_names
from fisher_mask_mergekit.loading import class_of, load_config
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks import QuestionAnswering, Task, task_of

SPLIT = "validation"
HEADED = ("sequence-classification", "token-classification", "question-answering", "multiple-choice")
"""Tasks whose models end in a head of their own; of the others, the merge is taken as it is."""


@dataclass(frozen=True)
class Options:
    """How to evaluate, for all models of a recipe.

    Attributes:
        samples: How many rows to draw; all if not given.
        seed: Of that draw, of masked tokens, and of the resamples.
        batch_size: Samples per batch.
        pooler: Whose pooler goes onto the merged encoder, see :func:`~fisher_mask_mergekit.heads.write_heads`.
        trust_remote_code: Whether to run code that comes with a checkpoint.
    """

    samples: int | None = None
    seed: int = 0
    batch_size: int = 32
    pooler: Pooler = "own"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Subject:
    """One model of the recipe, and what it is scored on.

    Attributes:
        name: Short.
        model: The recipe's entry.
        checkpoint: Its files.
        config: Its transformers configuration.
        task: What it predicts.
        metrics: The first is normalised.
        settings: How its samples are read.
        samples: Those samples.
    """

    name: str
    model: RecipeModel
    checkpoint: Checkpoint
    config: Any
    task: Task
    metrics: tuple[Metric, ...]
    settings: FisherSettings
    samples: Samples


@dataclass(frozen=True)
class Contender:
    """One model to run on a subject's samples.

    Attributes:
        line: :data:`~fisher_mask_mergekit.evaluation.scores.OWN`, or the merge's name.
        checkpoint: Whose configuration, tokenizer and, unless there is an encoder, weights these are.
        config: The configuration.
        kind: The class.
        encoder: The merged folder whose encoder is taken instead of the checkpoint's; with its tensors' shapes.
    """

    line: str
    checkpoint: Checkpoint
    config: Any
    kind: Any
    encoder: tuple[Checkpoint, Mapping[str, tuple[int, ...]]] | None


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        subjects: The recipe's models.
        merges: The merges' lines, in the order given.
        contenders: Per subject, in the same order, the fine-tuned model and the merges.
        pooler: Tensors that replace every model's own pooler.
        options: How.
    """

    subjects: Sequence[Subject]
    merges: Sequence[str]
    contenders: Sequence[Sequence[Contender]]
    pooler: Mapping[str, Tensor]
    options: Options


def plan(recipe: Recipe, merged: Sequence[str], options: Options) -> Plan:
    """Find all checkpoints, samples and metrics.

    Args:
        recipe: What was merged.
        merged: Merged folders.
        options: How to evaluate.

    Raises:
        FisherMaskError: On bad input.
    """
    if len({str(Path(one).resolve()) for one in merged}) < len(merged):
        raise RecipeError("a merged folder is named twice")
    models = [model for model in recipe.models if model.is_merged]
    for model in models:
        if model.settings is None and model.evaluation.eval is None:
            raise RecipeError(
                f"{recipe.path}: nothing says what to evaluate {model.name} on; add  fisher: {{eval: DATASET}}  beside it"
            )
    merges = short_names([OWN, *merged])[1:]
    encoders = [(folder, tensor_shapes(folder)) for folder in map(locate, merged)]
    names = short_names([model.name for model in models])
    subjects = [_subject(*pair, options) for pair in zip(names, models, strict=True)]
    contenders = [
        [_own(one, options), *(_merged(one, line, *encoder, options) for line, encoder in zip(merges, encoders, strict=True))]
        for one in subjects
    ]  # fmt: skip
    pooler: Mapping[str, Tensor] = {}
    if options.pooler == "average" and any(one.task.name in HEADED for one in subjects):
        pooler = average_pooler(models, [one.checkpoint for one in subjects])
    return Plan(subjects, merges, contenders, pooler, options)


def evaluation_data(settings: FisherSettings, given: str | None) -> str:
    """What to evaluate on: what the user says, else the split ``validation`` of what was measured on.

    Raises:
        DataError: If that is a single table, which has no splits.
    """
    if given is not None:
        return parse_spec(given, SPLIT).text
    spec = replace(parse_spec(settings.data or ""), split=SPLIT)
    if spec.is_one_table:
        raise DataError(
            f"data '{settings.data}' is one local table and has no split {SPLIT}; say what to evaluate on:  "
            "fisher: {eval: FILE}"
        )
    return spec.text


def _subject(name: str, model: RecipeModel, options: Options) -> Subject:
    data = evaluation_data(model.request, model.evaluation.eval)
    settings = model.request.model_copy(
        update={
            "data": data,
            "samples": options.samples or maxsize,
            "seed": options.seed,
            "labels": "data",
            "estimator": "sample",
        }
    )
    checkpoint = locate(model.name)
    config = load_config(checkpoint, trust_remote_code=options.trust_remote_code)
    task = task_of(config, model.name, settings)
    metrics = metrics_of(task, model.evaluation.metric, model.name)
    if isinstance(task, QuestionAnswering):
        task = AnswerTexts(task.loss)
    try:
        samples = load_samples(settings, task)
    except DataError as error:
        if model.evaluation.eval is None and "split" in str(error):
            remedy = "  fisher: {eval: PATH:CONFIG:SPLIT}"
            raise DataError(f"{error}; say what to evaluate on:{remedy}") from error
        raise
    return Subject(name, model, checkpoint, config, task, metrics, settings, samples)


def _own(subject: Subject, options: Options) -> Contender:
    kind = class_of(
        subject.checkpoint, subject.config, subject.task, trust_remote_code=options.trust_remote_code
    )
    return Contender(OWN, subject.checkpoint, subject.config, kind, None)


def _merged(
    subject: Subject,
    line: str,
    encoder: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    options: Options,
) -> Contender:
    """A merge as it is put to a subject's task."""
    if subject.task.name in HEADED:
        check_encoder(subject.checkpoint, encoder, shapes)
        return replace(_own(subject, options), line=line, encoder=(encoder, shapes))
    config = load_config(encoder, trust_remote_code=options.trust_remote_code)
    task = task_of(config, encoder.name, subject.settings)
    if task.name != subject.task.name:
        raise CheckpointError(
            f"{encoder.name} is not a merge of {subject.checkpoint.name}: made for {task.name}, not for {subject.task.name}"
        )
    kind = class_of(encoder, config, task, trust_remote_code=options.trust_remote_code)
    return Contender(line, encoder, config, kind, None)
