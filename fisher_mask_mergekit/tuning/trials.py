"""A trial: merged in memory, put to every task's held-back rows, scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy
import torch

from fisher_mask_mergekit.errors import DataError, RecipeError
from fisher_mask_mergekit.evaluation.plan import Contender, Merge, Options, Subject, plan_merges
from fisher_mask_mergekit.evaluation.run import run_contender
from fisher_mask_mergekit.evaluation.scores import normalise
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.recipe import Recipe
from fisher_mask_mergekit.tuning.coefficients import Coefficients
from fisher_mask_mergekit.tuning.study import Trial
from fisher_mask_mergekit.tuning.written import with_coefficients


def own_scores(subjects: Sequence[Subject], options: Options, device: torch.device) -> dict[str, float]:
    """Every fine-tuned model's score on its own task, by its first metric.

    Raises:
        DataError: If it is none that another could be compared with.
    """
    scores = {}
    for subject, (own,) in zip(subjects, plan_merges(subjects, [], options).contenders, strict=True):
        score = _score(subject, own, options, device)
        metric = subject.metrics[0]
        if not math.isfinite(score) or score <= 0:
            raise DataError(
                f"{subject.model.name} has {metric.name} {score:.3g} on the held-back rows of its own task, which no "
                "merge's score can be divided by; choose another --metric"
            )
        scores[subject.name] = score
    return scores


def run_trial(
    recipe: Recipe,
    subjects: Sequence[Subject],
    number: int,
    coefficients: Coefficients,
    own: Mapping[str, float],
    options: Options,
    device: torch.device,
) -> Trial:
    """Merge with given coefficients and score it.

    Args:
        recipe: What is tuned.
        subjects: Its models with the rows to score on.
        number: The trial's; 0 is the recipe as it is.
        coefficients: The trial's.
        own: The fine-tuned models' scores.
        options: How to evaluate.
        device: Where.

    Raises:
        FisherMaskError: If mergekit or a model fails.
    """
    document = with_coefficients(recipe, coefficients if number else None)
    encoder, config = merge_in_memory(
        document, f"{recipe.path}, trial {number}", trust_remote_code=options.trust_remote_code
    )
    # An averaged pooler goes by the trial's lambdas.
    weighted = [
        replace(one, model=replace(one.model, weight=coefficients.weights.get(one.model.name)))
        for one in subjects
    ]
    planned = plan_merges(weighted, [Merge("merged", encoder, config=config)], options)
    scores, ratios = {}, []
    for subject, (_, merged) in zip(weighted, planned.contenders, strict=True):
        score = _score(subject, merged, options, device)
        scores[subject.name] = score if math.isfinite(score) else None
        pair = numpy.array([own[subject.name]]), numpy.array([score])
        ratios.append(float(normalise(*pair, higher_is_better=subject.metrics[0].higher_is_better)[0]))
    value = sum(ratios) / len(ratios)
    return Trial(
        number=number,
        weights=dict(coefficients.weights),
        normalize=coefficients.normalize,
        prior=coefficients.prior,
        scores=scores,
        value=value if math.isfinite(value) else None,
    )


def _score(subject: Subject, contender: Contender, options: Options, device: torch.device) -> float:
    state = contender.state() if contender.state else None
    predictions = run_contender(subject, contender, state, options, device)
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return subject.metrics[0].scorer(predictions).value()


def refuse_tokenizer(recipe: Recipe) -> None:
    """Refuse what a merge in memory cannot be run with.

    Raises:
        RecipeError: If the recipe builds a tokenizer.
    """
    for key in ("tokenizer", "tokenizer_source"):
        if recipe.document.get(key):
            raise RecipeError(
                f"{recipe.path}: tune runs every merge with the models' own tokenizers, not with the one that {key} "
                f"builds; remove {key}"
            )
