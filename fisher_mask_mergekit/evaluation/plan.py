"""A recipe and its merges looked into: all that can be wrong before a model is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from sys import maxsize
from typing import Any

from torch import Tensor

from fisher_mask_mergekit.checkpoint import Checkpoint, locate
from fisher_mask_mergekit.data import Samples, load_samples, parse_spec
from fisher_mask_mergekit.errors import CheckpointError, DataError, RecipeError
from fisher_mask_mergekit.evaluation.answers import AnswerTexts
from fisher_mask_mergekit.evaluation.metrics import Metric, metrics_of
from fisher_mask_mergekit.evaluation.scores import OWN
from fisher_mask_mergekit.heads import (
    Encoder,
    Pooler,
    average_pooler,
    encoder_of,
    headed_state,
    short_names,
    stored,
)
from fisher_mask_mergekit.loading import class_of, load_config
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.settings import RANDOM, FisherSettings
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
        checkpoint: Whose configuration, tokenizer and, unless there are others, weights these are.
        config: The configuration.
        kind: The class.
        state: Gives the weights to take in place of the checkpoint's.
    """

    line: str
    checkpoint: Checkpoint
    config: Any
    kind: Any
    state: Callable[[], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Merge:
    """A merge to evaluate.

    Attributes:
        line: What tables call it.
        encoder: Its tensors.
        checkpoint: Its folder; None if it was not written.
        config: Its configuration, if it was not written.
    """

    line: str
    encoder: Encoder
    checkpoint: Checkpoint | None = None
    config: Any = None


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        subjects: The recipe's models.
        merges: The merges' lines, in the order given.
        contenders: Per subject, in the same order, the fine-tuned model and the merges.
        options: How.
    """

    subjects: Sequence[Subject]
    merges: Sequence[str]
    contenders: Sequence[Sequence[Contender]]
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
    found = [(folder, stored(folder)) for folder in map(locate, merged)]
    merges = [
        Merge(line, encoder, folder)
        for line, (folder, encoder) in zip(merge_lines(merged), found, strict=True)
    ]
    return plan_merges(subjects(recipe, options), merges, options)


def merge_lines(merged: Sequence[str]) -> list[str]:
    """What tables call merged folders, none like the fine-tuned models' own scores."""
    return [f"./{line}" if line == OWN else line for line in short_names([OWN, *merged])[1:]]


def subjects(recipe: Recipe, options: Options) -> list[Subject]:
    """What the merges of a recipe are scored on.

    Args:
        recipe: What was merged.
        options: How to evaluate.

    Raises:
        FisherMaskError: On bad input.
    """
    models = [model for model in recipe.models if model.is_merged]
    for model in models:
        if model.settings is None and model.evaluation.eval is None:
            raise RecipeError(
                f"{recipe.path}: nothing says what to evaluate {model.name} on; add  fisher: {{eval: DATASET}}  beside it"
            )
    names = short_names([model.name for model in models])
    return [_subject(*pair, options) for pair in zip(names, models, strict=True)]


def plan_merges(found: Sequence[Subject], merges: Sequence[Merge], options: Options) -> Plan:
    """Put merges beside the fine-tuned models.

    Args:
        found: The models.
        merges: All of these models.
        options: How to evaluate.

    Raises:
        FisherMaskError: If a merge is none of these models.
    """
    pooler: Mapping[str, Tensor] = {}
    if options.pooler == "average" and any(one.task.name in HEADED for one in found):
        pooler = average_pooler([one.model for one in found], [one.checkpoint for one in found])
    contenders = [
        [_own(one, options), *(_merged(one, merge, pooler, options) for merge in merges)] for one in found
    ]
    return Plan(found, [merge.line for merge in merges], contenders, options)


def evaluation_data(settings: FisherSettings, given: str | None) -> str:
    """What to evaluate on: what the user says, else the split ``validation`` of what was measured on.

    Raises:
        DataError: If that is a single table, which has no splits.
    """
    if given is not None:
        return parse_spec(given, SPLIT).text
    spec = replace(parse_spec(settings.data or ""), split=SPLIT)
    if spec.is_random:
        raise DataError(
            f"data '{RANDOM}' is to measure on; say what to evaluate on:  fisher: {{eval: PATH:CONFIG:SPLIT}}"
        )
    if spec.is_one_table:
        raise DataError(
            f"data '{settings.data}' is one local table and has no split {SPLIT}; say what to evaluate on:  "
            "fisher: {eval: FILE}"
        )
    return spec.text


def _subject(name: str, model: RecipeModel, options: Options) -> Subject:
    data = evaluation_data(model.request, model.evaluation.eval)
    settings = model.request.model_copy(
        update={"data": data, "samples": options.samples or maxsize, "seed": options.seed}
    )
    try:
        return subject_of(name, model, settings, options)
    except DataError as error:
        if model.evaluation.eval is None and "split" in str(error):
            remedy = "  fisher: {eval: PATH:CONFIG:SPLIT}"
            raise DataError(f"{error}; say what to evaluate on:{remedy}") from error
        raise


def subject_of(
    name: str, model: RecipeModel, settings: FisherSettings, options: Options, *, skip: int = 0
) -> Subject:
    """A model of a recipe with the samples to score it on.

    Args:
        name: Short.
        model: The recipe's entry.
        settings: Which samples, and how they are read.
        options: How to evaluate.
        skip: How many samples of the draw to leave out, from its first.

    Raises:
        FisherMaskError: On bad input.
    """
    settings = settings.model_copy(update={"labels": "data", "estimator": "sample"})
    checkpoint = locate(model.name)
    config = load_config(checkpoint, trust_remote_code=options.trust_remote_code)
    task = task_of(config, model.name, settings)
    metrics = metrics_of(task, model.evaluation.metric, model.name)
    if isinstance(task, QuestionAnswering):
        task = AnswerTexts(task.loss)
    samples = load_samples(settings, task, skip=skip)
    return Subject(name, model, checkpoint, config, task, metrics, settings, samples)


def _own(subject: Subject, options: Options) -> Contender:
    kind = class_of(
        subject.checkpoint, subject.config, subject.task, trust_remote_code=options.trust_remote_code
    )
    return Contender(OWN, subject.checkpoint, subject.config, kind)


def _merged(subject: Subject, merge: Merge, pooler: Mapping[str, Tensor], options: Options) -> Contender:
    """A merge as it is put to a subject's task."""
    own, encoder, trust = subject.checkpoint, merge.encoder, options.trust_remote_code
    if subject.task.name in HEADED:
        state = partial(headed_state, own, encoder_of(own, encoder), pooler)
        return replace(_own(subject, options), line=merge.line, state=state)
    checkpoint = merge.checkpoint or own
    config = merge.config or load_config(checkpoint, trust_remote_code=trust)
    task = task_of(config, encoder.name, subject.settings)
    if task.name != subject.task.name:
        raise CheckpointError(
            f"{encoder.name} is not a merge of {own.name}: made for {task.name}, not for {subject.task.name}"
        )
    kind = class_of(checkpoint, config, task, trust_remote_code=trust)
    whole = None if merge.checkpoint else lambda: dict(encoder.read(encoder.shapes))
    return Contender(merge.line, checkpoint, config, kind, whole)
