"""What mergekit would refuse or silently lose: findings from its plan."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, first_line
from fisher_mask_mergekit.heads import is_head
from fisher_mask_mergekit.preview.findings import Finding, listed
from fisher_mask_mergekit.preview.forecast import counted
from fisher_mask_mergekit.preview.losses import lost_tensors
from fisher_mask_mergekit.preview.peek import Peeked
from fisher_mask_mergekit.preview.plan import Output, plan_merge
from fisher_mask_mergekit.recipe import Recipe
from fisher_mask_mergekit.sites import name_template
from fisher_mask_mergekit.weighting import check_parent, check_prior


def planned(recipe: Recipe, models: Mapping[str, Peeked]) -> tuple[tuple[Output, ...], list[Finding]]:
    """What mergekit plans, or why that cannot be told."""
    for name, peeked in models.items():
        if peeked.shapes is None:
            why = f"{name} has no safetensors, or the hub cannot be reached: its tensors were not checked"
            return (), [Finding("warning", "checkpoint", why, f"download it:  hf download {name}")]
        if peeked.is_foreign:
            why = f"transformers has no {peeked.architecture} ({name}): what mergekit does with it was not checked"
            return (), [
                Finding("warning", "architecture", why, "compare the merge's tensors with an input's")
            ]
    try:
        return plan_merge(recipe, models), []
    except RecipeError as error:
        return (), [Finding("error", "recipe", str(error), "correct the recipe, or merge other models")]


def check_merge(recipe: Recipe, models: Mapping[str, Peeked], outputs: Sequence[Output]) -> Iterator[Finding]:
    """What the plan says of the checkpoints' tensors: missing ones, unequal ones, weights, silent losses."""
    missing = [*_missing(outputs)]
    yield from missing
    yield from _unequal(recipe, outputs)
    if recipe.kind is not None:
        yield from _weights(outputs)
        yield from _prior(outputs)
    if outputs and not missing:
        yield from _losses(recipe, models, outputs)


def _missing(outputs: Sequence[Output]) -> Iterator[Finding]:
    problems: dict[str, list[str]] = {}
    for output in outputs:
        for one in output.inputs:
            if one.problem:
                problems.setdefault(one.model, []).append(one.problem)
    for model, found in problems.items():
        yield Finding(
            "error", "architecture", f"mergekit will stop: {listed(found, 1)}",
            f"mergekit's definition of the architecture does not fit {model}; mergekit cannot merge it",
        )  # fmt: skip


def _unequal(recipe: Recipe, outputs: Sequence[Output]) -> Iterator[Finding]:
    """Tensors that mergekit will refuse because their inputs have different shapes."""
    unequal: dict[str, list[str]] = {}
    for output in outputs:
        axis = output.vocabulary_axis
        shapes = [one.shape or () for one in output.there]
        if output.aligned and axis is not None:
            shapes = [shape[:axis] + shape[axis + 1 :] for shape in shapes]
        if len(set(shapes)) > 1:
            kind = "vocabulary" if axis is not None else "heads" if is_head(output.name) else "shapes"
            each = ", ".join(f"{list(one.shape or ())} in {one.model}" for one in output.there)
            unequal.setdefault(kind, []).append(f"{output.name} is {each}")
    names = " ".join(shlex.quote(model.name) for model in recipe.models if model.is_merged)
    if recipe.has_prior:
        names += "".join(
            f" --parent {shlex.quote(model.name)}" for model in recipe.models if not model.is_merged
        )
    remedies = {
        "vocabulary": "let mergekit align the vocabularies:  tokenizer: {source: base}",
        "heads": f"write a recipe that takes the head from one model:  mergekit-fisher init {names}",
        "shapes": "the models differ in size; merge models that were fine-tuned from one pre-trained model",
    }
    for kind, found in unequal.items():
        yield Finding("error", kind, listed(found, 2), remedies[kind])


def _weights(outputs: Sequence[Output]) -> Iterator[Finding]:
    alone = set()
    for output in outputs:
        try:
            parts = counted(output) if output.there else []
        except FisherMaskError as error:
            yield Finding(
                "error", "weight", str(error), "give at least one model a weight above 0, none below"
            )
            return
        if len(parts) > 1:
            return
        alone |= {one.model for one, _ in parts}
    if alone:
        yield Finding(
            "warning", "weight", f"nothing is merged: every tensor is that of {' or '.join(sorted(alone))} alone",
            "parameters: {weight: 1.0} beside each model that is to count, the base model too",
        )  # fmt: skip


def _prior(outputs: Sequence[Output]) -> Iterator[Finding]:
    """A prior that the merge will refuse."""
    for output in outputs:
        base = next((one for one in output.there if one.is_base), None)
        try:
            prior = check_prior(output.parameters["prior"], output.parameters["normalize"])
            if prior and len(counted(output)) > 1:
                weight = None if base is None else base.parameters["weight"]
                check_parent(prior, base and base.model, weight)
        except FisherMaskError as error:
            yield Finding("error", "recipe", str(error), "correct the recipe, or leave prior out")
            return


def _losses(recipe: Recipe, models: Mapping[str, Peeked], outputs: Sequence[Output]) -> Iterator[Finding]:
    document = recipe.document
    moved = bool(document.get("slices") or document.get("modules"))
    used = {one.model for output in outputs for one in output.inputs}
    lost: dict[tuple[str, ...], list[str]] = {}
    for name in used:
        try:
            found = lost_tensors(outputs, models[name].shapes or {}, models[name].model(), moved)
        except Exception as error:  # The model as transformers makes it: whatever its code raises.
            yield Finding(
                "warning", "loss", f"what the merge loses of {name} cannot be told: {first_line(error)}",
                "compare the merge's tensors with an input's",
            )  # fmt: skip
            continue
        if found:
            lost.setdefault(tuple(found), []).append(name)
    for tensors, names in lost.items():
        templates = list(dict.fromkeys(map(name_template, tensors)))
        remedy = "mergekit does not know these tensors: the merge lacks them, and whoever loads it gets random ones"
        if all(is_head(tensor) for tensor in tensors):
            remedy = f"give the merge a head afterwards:  mergekit-fisher heads {recipe.path} MERGED OUT"
        yield Finding(
            "error", "loss", f"the merge will silently lack {len(tensors)} tensors of {', '.join(sorted(names))}: {listed(templates, 8)}",
            remedy,
        )  # fmt: skip
