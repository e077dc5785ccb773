"""What a recipe says and nobody would read, or would read otherwise than meant."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fisher_mask_mergekit.data import LOADERS, parse_spec
from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.preview.findings import Finding
from fisher_mask_mergekit.recipe import DIAGONAL_METHOD, METHOD, Recipe
from fisher_mask_mergekit.store import adapted

OF_A_MODEL = ("weight", "sidecar")
OF_THE_MERGE: Mapping[str, tuple[str, ...]] = {
    METHOD: ("nodes", "values", "normalize", "unmasked", "prior", "clip", "missing"),
    DIAGONAL_METHOD: ("normalize", "prior", "clip", "missing"),
}
"""The methods' parameters."""


def check_keys(recipe: Recipe, document: Mapping[str, Any]) -> Iterator[Finding]:
    """Look for keys that mergekit ignores, data that is not there, and names that mergekit cannot use.

    Args:
        recipe: The recipe as this package reads it.
        document: The same as plain YAML.
    """
    if recipe.method in OF_THE_MERGE:
        for section in _sections(document):
            yield from _unknown(section, recipe.method)
    for model in recipe.models:
        yield from _name(model.name)
        if model.settings is not None:
            yield from _data(model.settings.data or "", model.name)


def _sections(part: Any) -> Iterator[Mapping[str, Any]]:
    """The recipe's mappings that may have parameters."""
    if not isinstance(part, dict):
        return
    yield part
    modules = part.get("modules")
    for module in modules.values() if isinstance(modules, dict) else ():
        yield from _sections(module)
    for key in ("models", "slices", "sources"):
        entries = part.get(key)
        for entry in entries if isinstance(entries, list) else ():
            yield from _sections(entry) if key == "slices" else [entry] if isinstance(entry, dict) else ()


def _unknown(section: Mapping[str, Any], method: str) -> Iterator[Finding]:
    known = (*OF_A_MODEL, *OF_THE_MERGE[method])
    given = section.get("parameters")
    parameters: dict[Any, Any] = given if isinstance(given, dict) else {}
    for key in parameters:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            yield Finding(
                "error", "recipe", f"{method} has no parameter '{key}': mergekit ignores it, and merges without",
                f"write {nearest[0]}" if nearest else f"remove it; there are {', '.join(known)}",
            )  # fmt: skip
        elif key in OF_THE_MERGE[method] and "model" in section:
            yield Finding(
                "warning", "recipe", f"mergekit ignores '{key}' beside a model: it is one value for all models",
                f"parameters: {{{key}: {parameters[key]}}} at the top level of the recipe",
            )  # fmt: skip
    for key in section:
        if key != "fisher" and get_close_matches(str(key), ["fisher"], cutoff=0.8):
            yield Finding(
                "warning", "recipe", f"nothing reads the key '{key}'", "fisher: says what to measure"
            )


def _name(name: str) -> Iterator[Finding]:
    reference = adapted(name)
    if reference is not None:
        yield Finding(
            "warning", "adapter", f"mergekit applies {reference[2]} only where it is given a folder to do it in",
            "mergekit-yaml ... --lora-merge-cache FOLDER",
        )  # fmt: skip
    elif Path(name).is_dir() and not Path(name).is_absolute() and not name.startswith("."):
        yield Finding(
            "warning", "checkpoint", f"mergekit asks the hub for '{name}' when it writes the model card, and fails offline",
            f"model: {Path(name).resolve()}",
        )  # fmt: skip


def _data(data: str, model: str) -> Iterator[Finding]:
    try:
        spec = parse_spec(data)
    except DataError as error:
        yield Finding("error", "data", str(error), f"correct fisher: {{data: ...}} of {model}")
        return
    local = spec.path.startswith((".", "/", "~")) or Path(spec.path).suffix in LOADERS
    if local and not spec.is_local:
        yield Finding(
            "warning", "data", f"there is no {spec.path}, which {model} is to be measured on",
            "paths are relative to where the command runs",
        )  # fmt: skip
