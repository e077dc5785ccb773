"""What a user asks ``compute`` to measure: the options that say it, and the models of a recipe."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_mask_mergekit.cli.output import say
from fisher_mask_mergekit.errors import RecipeError

if TYPE_CHECKING:
    from fisher_mask_mergekit.recipe import RecipeModel
    from fisher_mask_mergekit.settings import FisherSettings


Request = tuple[str, "FisherSettings", Path | None]
"""A model, its settings, and where to write if not to the usual place."""


def requests(target: str, overrides: dict[str, Any], out: Path | None, *, looks: bool) -> Iterator[Request]:
    """What to measure: model, settings, and where to write if not to the usual place.

    Args:
        target: A recipe or a checkpoint.
        overrides: What beats the recipe's settings.
        out: Where to write, if that was given.
        looks: Whether to see to it that models that are not measured have a sidecar.
    """
    from pydantic import ValidationError

    from fisher_mask_mergekit import hub
    from fisher_mask_mergekit.recipe import describe, read_recipe
    from fisher_mask_mergekit.settings import FisherSettings
    from fisher_mask_mergekit.store import expanded, of_share

    if Path(target).suffix not in (".yml", ".yaml") and not Path(target).is_file():
        if "data" not in overrides:
            raise RecipeError(
                f"say what to measure {target} on:  mergekit-fisher compute {target} --data DATASET"
            )
        try:
            yield target, FisherSettings.model_validate(overrides), out
        except ValidationError as error:
            raise RecipeError(describe(error)) from error
        return
    recipe = read_recipe(Path(target), overrides)
    if recipe.kind is None:
        say(f"{target}: merge_method is {recipe.method}, which uses no sidecars; measuring all the same")
    # What a recipe's sidecar names is of the kind that its method reads.
    paths = {
        m.name: m.sidecar
        for m in recipe.models
        if m.settings is not None and m.sidecar and m.kind == (recipe.kind or m.kind)
    }
    published = {name for name, path in paths.items() if path.startswith(hub.PREFIX)}
    measurable = [m for m in recipe.models if m.settings is not None and m.name not in published]
    for model in recipe.models if looks else ():
        if model not in measurable and model.counts:
            _check_has_sidecar(model, target)
    if out is not None and len(measurable) > 1:
        raise RecipeError("--out takes one model; for a recipe, give each model  parameters: {sidecar: PATH}")
    if len(set(paths.values())) < len(paths):
        double = max(paths.values(), key=list(paths.values()).count)
        raise RecipeError(
            f"{target}: two models have the same sidecar: {double}; give each one of its own:  "
            "parameters: {sidecar: PATH}"
        )
    for model in measurable:
        assert model.settings is not None
        path = paths.get(model.name)
        share = model.settings.share
        yield model.name, model.settings, out or (of_share(expanded(path), share) if path else None)


def _check_has_sidecar(model: "RecipeModel", recipe: str) -> None:
    """A model without data, or with a sidecar on the hub, must have been measured by somebody else."""
    from fisher_mask_mergekit import store
    from fisher_mask_mergekit.checkpoint import locate

    found = store.sidecar_of(model.sidecar, None if model.sidecar else locate(model.name), model.kind)
    if isinstance(found, Path) and not found.exists():
        raise RecipeError(
            f"{recipe}: {model.name} has no data to measure it on, and its sidecar {found} does not exist; "
            "correct the path, or add  fisher: {data: DATASET}  beside it"
        )
    if found is None:
        raise RecipeError(
            f"{recipe}: {model.name} has no sidecar and no data to measure it on; "
            "add  fisher: {data: DATASET}  beside it"
        )
    why = "no data in the recipe" if model.settings is None else f"the recipe names {model.sidecar}"
    say(f"{model.name}: {why}; its sidecar is {found}")


def parse_text(text: str) -> Any:
    """The columns that ``--text`` names.

    Raises:
        RecipeError: If it begins like JSON and is none.
    """
    if text.startswith("["):
        return _parse_json(text, "--text")
    return tuple(text.split(",")) if "," in text else text


def parse_label_map(text: str) -> Any:
    """What ``--label-map`` maps.

    Raises:
        RecipeError: If it is neither pairs nor JSON.
    """
    if text.startswith("{"):
        return _parse_json(text, "--label-map")
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and sign and value.strip() for key, sign, value in pairs):
        raise RecipeError(f"--label-map: expected DATA=CHECKPOINT pairs with commas between, got '{text}'")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _parse_json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{option}: not JSON: {error}, got '{text}'") from error
