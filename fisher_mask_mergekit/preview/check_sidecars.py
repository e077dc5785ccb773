"""Whether every sidecar is there, fits its model, and was measured like the others."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.checkpoint import modern, read_tensors
from fisher_mask_mergekit.errors import FisherMaskError, SidecarError, SidecarMismatchError, SidecarShareError
from fisher_mask_mergekit.merging import with_own_sidecar
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.parameter_records import ParameterSidecar
from fisher_mask_mergekit.preview.findings import Finding
from fisher_mask_mergekit.preview.forecast import counted, forecast
from fisher_mask_mergekit.preview.inspection import sidecar_of
from fisher_mask_mergekit.preview.peek import Peeked, same_weights
from fisher_mask_mergekit.preview.plan import Output
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sidecar import Measurement, Sidecar, whole

_UNEQUAL_LOSSES = 2.0
"""From which ratio of losses on they are warned of."""

_COMPARED: Mapping[str, Callable[[Measurement], Any]] = {
    "task": lambda metadata: metadata.task,
    "loss": lambda metadata: metadata.settings.loss,
    "estimator": lambda metadata: metadata.settings.estimator,
    "mask_placement": lambda metadata: metadata.settings.mask_placement,
    "labels": lambda metadata: metadata.settings.labels,
    "samples": lambda metadata: metadata.samples,
}


def check_sidecars(
    recipe: Recipe, models: Mapping[str, Peeked], outputs: Sequence[Output]
) -> Iterator[Finding]:
    """Look at the sidecars of all models that a merge weighs against others.

    Args:
        recipe: The recipe.
        models: Those of its models that were found.
        outputs: mergekit's plan; empty if there is none.
    """
    needed = _needed(recipe, outputs)
    normalized = any(output.parameters.get("normalize", "none") != "none" for output in outputs)
    if recipe.kind in ("factored", "diagonal"):
        chosen = [model for model in recipe.models if model.name in needed and model.name in models]
        yield from _of_parameters(recipe, recipe.kind, chosen, models, outputs, normalized)
        return
    sidecars: dict[str, Sidecar | None] = {}
    for model in recipe.models:
        if model.name not in needed or model.name not in models:
            continue
        try:
            sidecars[model.name] = sidecar_of(model, models[model.name])
        except SidecarError as error:
            yield _unusable(recipe, model, error)
            continue
        sidecar = sidecars[model.name]
        if sidecar is None:
            yield _absent(recipe, model, outputs)
        else:
            yield from _misfits(recipe, model, models[model.name], sidecar, outputs)
            yield from _outdated(recipe, model, sidecar)
    yield from _disagreement(recipe, outputs, sidecars)
    yield from _unlike({name: one.metadata for name, one in sidecars.items() if one}, normalized)


def _of_parameters(
    recipe: Recipe,
    kind: Kind,
    needed: Sequence[RecipeModel],
    models: Mapping[str, Peeked],
    outputs: Sequence[Output],
    normalized: bool,
) -> Iterator[Finding]:
    """The same for sidecars of all parameters. Of full-size ones on the hub nothing can be told without a download of them."""
    measured: dict[str, Measurement] = {}
    for model in needed:
        peeked = models[model.name]
        try:
            path = store.sidecar_of(model.sidecar, peeked.checkpoint, kind)
            sidecar = None if path is None else whole(read_any(path, kind))
        except SidecarError as error:
            yield _unusable(recipe, model, error)
            continue
        if sidecar is None:
            if peeked.checkpoint.revision is None or kind == "factored":
                yield _absent(recipe, model, outputs)
            continue
        measured[model.name] = sidecar.metadata
        if peeked.readable:
            yield from _other_values(model, peeked, sidecar, _compute(recipe, model))
        yield from _outdated(recipe, model, sidecar)
    yield from _unlike(measured, normalized)


def _needed(recipe: Recipe, outputs: Sequence[Output]) -> set[str]:
    """The models that count in a tensor beside others."""
    if not outputs:
        return {model.name for model in recipe.models if model.counts}
    needed = set()
    for output in outputs:
        try:
            parts = counted(output) if output.there else []
        except FisherMaskError:
            continue  # Reported with the weights.
        if len(parts) > 1:
            needed |= {one.model for one, _ in parts}
    return needed


def _compute(recipe: Recipe, model: RecipeModel) -> str:
    command = f"mergekit-fisher compute {shlex.quote(str(recipe.path))}"
    if model.settings is None:
        here = model.sidecar if model.sidecar and not model.sidecar.startswith(hub.PREFIX) else None
        out = f" --out {shlex.quote(here)}" if here else ""
        kind = "" if model.kind == "mask" else f" --kind {model.kind}"
        command = f"mergekit-fisher compute {shlex.quote(model.name)}{kind} --data DATASET{out}"
    return with_own_sidecar(recipe.models, model.name, command)


def _unusable(recipe: Recipe, model: RecipeModel, error: SidecarError) -> Finding:
    # Measured anew into its place, a share would be lost.
    remedy = "add all shares up" if isinstance(error, SidecarShareError) else _compute(recipe, model)
    return Finding("error", "sidecar", str(error), remedy)


def _absent(recipe: Recipe, model: RecipeModel, outputs: Sequence[Output]) -> Finding:
    averages = any(output.parameters.get("missing") == "average" for output in outputs)
    detail = f"there is none for {model.name}" + (": all models are averaged by weight" if averages else "")
    return Finding("warning" if averages else "error", "sidecar", detail, _compute(recipe, model))


def _misfits(
    recipe: Recipe, model: RecipeModel, peeked: Peeked, sidecar: Sidecar, outputs: Sequence[Output]
) -> Iterator[Finding]:
    """Whether a sidecar was measured on this very checkpoint."""
    names = {one.name for output in outputs for one in output.there if one.model == model.name}
    governed = {name for name, (_, tensor) in sidecar.governed.items() if tensor.layout != "mean"}
    remedy = _compute(recipe, model)
    if names and not names & governed:
        was = f"it was measured on {sidecar.metadata.described_checkpoint}, a {sidecar.metadata.architecture}"
        detail = f"'{sidecar.source}' governs no tensor that is merged of {model.name}: {was}"
        yield Finding("error", "sidecar", detail, remedy)
    elif peeked.readable:
        yield from _other_values(model, peeked, sidecar, remedy)
    elif peeked.checkpoint.revision is not None:
        yield from _other_revision(model, peeked.checkpoint.revision, sidecar, remedy)


def _outdated(recipe: Recipe, model: RecipeModel, sidecar: AnySidecar) -> Iterator[Finding]:
    """Whether the recipe asks for another measurement by now."""
    if model.settings is None:
        return
    asked, was = model.settings.definition(), sidecar.metadata.settings.definition()
    other = [
        f"{name} {was[name]!r}, not {value!r}"
        for name, value in asked.items()
        if was.get(name, value) != value
    ]
    if other:
        detail = f"'{sidecar.source}' was measured with {', '.join(other)}"
        yield Finding("warning", "sidecar", detail, _compute(recipe, model))


def _other_values(model: RecipeModel, peeked: Peeked, sidecar: AnySidecar, remedy: str) -> Iterator[Finding]:
    known = sidecar.records.keys() if isinstance(sidecar, ParameterSidecar) else sidecar.governed.keys()
    wanted = known & {modern(name) for name in peeked.shapes or ()}
    for name, tensor in read_tensors(peeked.checkpoint, wanted):
        try:
            sidecar.identify(name, tensor)
        except SidecarMismatchError as error:
            yield Finding("error", "sidecar", f"{model.name}: {error}", remedy)
            return


def _other_revision(model: RecipeModel, revision: str, sidecar: Sidecar, remedy: str) -> Iterator[Finding]:
    """Without the values: a published sidecar is younger than the commit that it was measured on."""
    measured = sidecar.metadata.revision
    if measured == revision:
        return
    path = model.name.partition("@")[0]
    same = None if measured is None else same_weights(path, measured, revision)
    if same:
        return
    detail = (
        f"'{sidecar.source}' was measured on {sidecar.metadata.described_checkpoint}, {model.name} is at "
        f"{revision[:7]}"
    )
    if same is None:
        told = "; whether the weights are the same cannot be told without a download: the merge compares them"
        yield Finding("warning", "sidecar", detail + told, remedy)
    else:
        yield Finding("error", "sidecar", f"{detail}, which has other weights", remedy)


def _disagreement(
    recipe: Recipe, outputs: Sequence[Output], sidecars: Mapping[str, Sidecar | None]
) -> Iterator[Finding]:
    for output in outputs:
        try:
            forecast(output, sidecars) if output.there else None
        except SidecarMismatchError as error:
            remedy = f"measure all models with this version:  mergekit-fisher compute {recipe.path} --force"
            yield Finding("error", "sidecar", f"{output.name}: {error}", remedy)
            return
        except FisherMaskError:
            continue  # Reported with the weights.


def _unlike(measured: Mapping[str, Measurement], normalized: bool) -> Iterator[Finding]:
    """What makes the scales of the models' Fisher information differ."""
    for name, value in _COMPARED.items():
        values = {model: value(metadata) for model, metadata in measured.items()}
        if len(set(values.values())) > 1:
            each = ", ".join(f"{one} for {model}" for model, one in values.items())
            yield Finding(
                "warning", "measurement", f"the models differ in {name}: {each}",
                f"measure them alike; {name} is a key under fisher: for all models" if name != "task"
                else "merge models of one task, or let each count alike:  parameters: {normalize: model}",
            )  # fmt: skip
    losses = {model: metadata.loss for model, metadata in measured.items()}
    if not normalized and losses and max(losses.values()) >= _UNEQUAL_LOSSES * min(losses.values()):
        each = (
            ", ".join(f"{loss:.4f} for {model}" for model, loss in losses.items()) if len(losses) > 1 else ""
        )
        if each:
            yield Finding(
                "warning", "measurement", f"the models' losses differ: {each}; the larger one weighs its model more",
                "let each model count alike:  parameters: {normalize: model}",
            )  # fmt: skip
