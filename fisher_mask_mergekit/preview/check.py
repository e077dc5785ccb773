"""What is wrong with a recipe, before anything is downloaded or computed beyond configurations and sidecars."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fisher_mask_mergekit.checkpoint import read_config
from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from fisher_mask_mergekit.preview.check_keys import check_keys
from fisher_mask_mergekit.preview.check_merge import check_merge, planned
from fisher_mask_mergekit.preview.check_sidecars import check_sidecars
from fisher_mask_mergekit.preview.findings import Finding
from fisher_mask_mergekit.preview.peek import Peeked, peek
from fisher_mask_mergekit.preview.plan import Output
from fisher_mask_mergekit.recipe import METHOD, Recipe, read_recipe
from fisher_mask_mergekit.vocabulary import first_unlike, vocabulary


def check_recipe(path: Path) -> list[Finding]:
    """Look into a recipe, its models and their sidecars.

    Of local checkpoints the configurations, the headers of the weight files, the sidecars, and sixteen values
    of each governed tensor are read; of hub ids the configuration and the sidecar are downloaded, and the
    headers read.

    Returns:
        What is wrong, errors first.
    """
    try:
        recipe = read_recipe(path)
    except RecipeError as error:
        return [Finding("error", "recipe", str(error), "correct the recipe; docs/cli.md lists the settings")]
    document = recipe.document
    findings = [*_settings(recipe, document), *check_keys(recipe, document)]
    models: dict[str, Peeked] = {}
    for model in recipe.models:
        try:
            models[model.name] = peek(model.name)
        except CheckpointError as error:
            findings.append(Finding("error", "checkpoint", str(error), f"correct the name in {path}"))
    findings += _classes(models)
    outputs: tuple[Output, ...] = ()
    if len(models) == len(recipe.models):
        outputs, found = planned(recipe, models)
        findings += found
        findings += check_merge(recipe, models, outputs)
    if not any(one.what == "vocabulary" for one in findings):
        findings += _tokens(recipe, models)
    if recipe.kind is not None:
        findings += check_sidecars(recipe, models, outputs)
    return sorted(findings, key=lambda finding: finding.level)


def _settings(recipe: Recipe, document: Mapping[str, Any]) -> Iterator[Finding]:
    if recipe.kind is None:
        yield Finding(
            "warning", "recipe", f"merge_method is {recipe.method}, which uses no sidecars",
            f"for a merge by Fisher information:  merge_method: {METHOD}",
        )  # fmt: skip
    if not document.get("base_model"):
        yield Finding(
            "warning", "base model", "the recipe names none: mergekit takes the configuration from an arbitrary input",
            f"base_model: {recipe.models[0].name}",
        )  # fmt: skip
    for model in recipe.models:
        is_parent = recipe.has_prior and model.settings is None
        if not model.counts and _is_listed(model.name, document) and not is_parent:
            yield Finding(
                "warning", "weight", f"{model.name} is listed, but as the base model it does not count without a weight",
                "parameters: {weight: 1.0} beside it; or, if it is only the others' parent, out of the list",
            )  # fmt: skip
    for key in ("dtype", "out_dtype"):
        if document.get(key) == "float16":
            yield Finding(
                "warning", "dtype", f"{key} is float16: weights beyond 65504 overflow, those below 6e-8 vanish",
                f"{key}: bfloat16, or float32",
            )  # fmt: skip


def _is_listed(name: str, document: Mapping[str, Any]) -> bool:
    """Whether a model is more than the base model."""
    entries = [document, *(document.get("slices") or ())]
    return any(
        entry.get("model") == name
        for part in entries
        for entry in part.get("models") or part.get("sources") or ()
    )


def _tokens(recipe: Recipe, models: Mapping[str, Peeked]) -> Iterator[Finding]:
    """Models whose tokens have other ids: mergekit averages the rows of unlike tokens, and sees nothing of it."""
    if recipe.document.get("tokenizer") or recipe.document.get("tokenizer_source"):
        return
    first: tuple[str, dict[str, int]] | None = None
    for name, peeked in models.items():
        try:
            found = vocabulary(peeked.checkpoint)
        except CheckpointError as error:
            yield Finding(
                "warning",
                "vocabulary",
                str(error),
                f"save {name} with the tokenizer that it was trained with",
            )
            continue
        if found is None:
            continue
        if first is None:
            first = name, found
        elif unlike := first_unlike(first[1], found):
            token, here, there = unlike
            other = "none" if there is None else f"token {there}"
            yield Finding(
                "warning", "vocabulary", f"'{token}' is token {here} of {first[0]} and {other} of {name}: rows of unlike tokens "
                "would be averaged",
                "merge models of one tokenizer; or let mergekit align the vocabularies:  tokenizer: {source: base}",
            )  # fmt: skip


def _classes(models: Mapping[str, Peeked]) -> Iterator[Finding]:
    classes = {name: peeked.architecture for name, peeked in models.items()}
    if len(set(classes.values())) > 1:
        listed = ", ".join(f"{name} is a {kind}" for name, kind in classes.items())
        yield Finding(
            "warning", "architecture", f"the models are of different classes: {listed}",
            "merge models of one class; mergekit takes the configuration of base_model for the output",
        )  # fmt: skip
    types = {name: str(read_config(peeked.checkpoint).get("model_type")) for name, peeked in models.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} is a {kind}" for name, kind in types.items())
        yield Finding(
            "error", "architecture", f"the models are of different architectures: {listed}",
            "merge models that were fine-tuned from one pre-trained model",
        )  # fmt: skip
