"""The recipe: a mergekit YAML file that also says, under ``fisher:``, what to measure on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.settings import FisherSettings

METHOD = "fisher_mask"


@dataclass(frozen=True)
class RecipeModel:
    """A model of the recipe.

    Attributes:
        name: As the recipe writes it.
        settings: What to measure; None if the recipe names no data for it.
        weight: Its ``weight`` parameter; None if it has none, or one that is not a plain number.
        sidecar: Its ``sidecar`` parameter.
        is_base: Whether it is the recipe's ``base_model``.
    """

    name: str
    settings: FisherSettings | None
    weight: float | None
    sidecar: str | None
    is_base: bool


@dataclass(frozen=True)
class Recipe:
    """What this package reads of a recipe; the rest is mergekit's.

    Attributes:
        path: The file.
        method: Its ``merge_method``.
        models: Each model once, in order of appearance; the base model last if nothing else names it.
    """

    path: Path
    method: str
    models: tuple[RecipeModel, ...]


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: Settings that beat the recipe's, for every model.

    Raises:
        RecipeError: If it cannot be read, is not a recipe, or has a wrong key under ``fisher:``.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or not isinstance(document.get("merge_method"), str):
        raise RecipeError(f"{path} is not a mergekit recipe: it has no merge_method")
    default_parameters = _mapping(document.get("parameters"), "parameters", path)
    defaults = _mapping(document.get("fisher"), "fisher", path)
    _settings(defaults, f"{path}: fisher")
    found: dict[str, dict[str, Any]] = {}
    for entry in _entries(document, path):
        name = _model_name(entry, path)
        model = found.setdefault(name, {"fisher": None, "parameters": {}})
        given = entry.get("fisher")
        if given is not None:
            given = _mapping(given, f"fisher of {name}", path)
            if model["fisher"] not in (None, given):
                raise RecipeError(f"{path}: {name} appears twice with different fisher: keys")
            model["fisher"] = given
        model["parameters"] = {
            **_mapping(entry.get("parameters"), f"parameters of {name}", path),
            **model["parameters"],
        }
    base = document.get("base_model")
    if isinstance(base, str):
        found.setdefault(base, {"fisher": None, "parameters": {}})
    if not found:
        raise RecipeError(f"{path} names no models")
    models = []
    for name, model in found.items():
        wanted = {**defaults, **(model["fisher"] or {}), **(overrides or {})}
        settings = _settings(wanted, f"{path}: fisher of {name}")
        weight, sidecar = (
            {**default_parameters, **model["parameters"]}.get(key) for key in ("weight", "sidecar")
        )
        models.append(
            RecipeModel(
                name=name,
                settings=settings if settings.data else None,
                weight=float(weight) if isinstance(weight, int | float) else None,
                sidecar=sidecar if isinstance(sidecar, str) and sidecar else None,
                is_base=name == base,
            )
        )
    return Recipe(path, document["merge_method"], tuple(models))


def _entries(document: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """Every place of a recipe that names an input model, in order."""
    for section in (document, *_mapping(document.get("modules"), "modules", path).values()):
        if not isinstance(section, dict):
            raise RecipeError(f"{path}: a module of modules: is not a mapping")
        slices = _list(section.get("slices"), "slices", path)
        lists = [section.get("models"), *(_mapping(part, "a slice", path).get("sources") for part in slices)]
        for entry in (entry for group in lists for entry in _list(group, "models or sources", path)):
            yield _mapping(entry, "an entry of models or sources", path)


def _model_name(entry: Mapping[str, Any], path: Path) -> str:
    name = entry.get("model")
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: expected 'model: NAME', got {str(entry)[:80]}")
    return name


def _mapping(value: Any, what: str, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {what} must be a mapping, got {str(value)[:80]}")
    return value


def _list(value: Any, what: str, path: Path) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecipeError(f"{path}: {what} must be a list, got {str(value)[:80]}")
    return value


def _settings(values: Mapping[str, Any], where: str) -> FisherSettings:
    try:
        return FisherSettings.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """A pydantic error as one line: which key, what was expected, what was got, which keys there are."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; known keys: {', '.join(FisherSettings.model_fields)}"
    return f"{key + ': ' if key else ''}{first['msg']}" + (f", got {first['input']!r:.80}" if key else "")
