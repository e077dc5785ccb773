"""The recipe: a mergekit YAML file that also says, under ``fisher:``, what to measure on."""

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.settings import EvaluationSettings, FisherSettings, Kind
from fisher_mask_mergekit.untrusted import MOST_RECIPE_BYTES, checked_name, read_regular, read_yaml

METHOD = "fisher_mask"
DIAGONAL_METHOD = "fisher_diagonal"
Nodes = Literal["paper", "columns", "all"]
"""What ``fisher_mask`` can go by."""

ALL: Nodes = "all"
"""Every row and column of every parameter."""


@dataclass(frozen=True)
class RecipeModel:
    """A model of the recipe.

    Attributes:
        name: As the recipe writes it.
        settings: What to measure; None if the recipe names no data for it. Data that is named for all models is not
            for one that does not count: it is the parent of the others.
        kind: Of Fisher information.
        weight: Its ``weight`` parameter; None if it has none; ``varies`` if it is not one plain number, but a
            filter, a gradient, or different in different slices.
        counts: Whether it has part in the merge anywhere: with a weight, or where it is not the base model.
        sidecar: Its ``sidecar`` parameter.
        is_base: Whether it is the recipe's ``base_model``, or that of one of its slices.
        request: The same settings, also where they name no data.
        evaluation: What to score it on.
    """

    name: str
    settings: FisherSettings | None
    kind: Kind
    weight: float | Literal["varies"] | None
    counts: bool
    sidecar: str | None
    is_base: bool
    request: FisherSettings
    evaluation: EvaluationSettings

    @property
    def is_merged(self) -> bool:
        """Whether its task is one that the merge is to do: not that of a base which only surrounds it."""
        return self.counts or self.settings is not None


@dataclass(frozen=True)
class Recipe:
    """What this package reads of a recipe; the rest is mergekit's.

    Attributes:
        path: The file.
        method: Its ``merge_method``.
        kind: What its method goes by, and so what is measured for it unless the recipe or an option says otherwise; None
            for methods that use no sidecars.
        models: Each model once, in order of appearance; the base model last if nothing else names it.
        document: All of it, as the YAML has it.
    """

    path: Path
    method: str
    kind: Kind | None
    models: tuple[RecipeModel, ...]
    document: Mapping[str, Any]

    @property
    def has_prior(self) -> bool:
        """Whether it merges from its models' parent, which then is the base model."""
        levels = (level for place in places(dict(self.document), self.path) for level in place[:-1])
        return any((level.get("parameters") or {}).get("prior") for level in levels)


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: Settings that beat the recipe's, for every model.

    Raises:
        RecipeError: If it cannot be read, is not a recipe, or has a wrong key under ``fisher:``.
    """
    document = read_yaml(read_regular(path, MOST_RECIPE_BYTES, "recipe", RecipeError), path)
    if not isinstance(document, dict) or not isinstance(document.get("merge_method"), str):
        raise RecipeError(f"{path} is not a mergekit recipe: it has no merge_method")
    defaults = _mapping(document.get("fisher"), "fisher", path)
    kind = _kind(document, path)
    if kind is not None:
        defaults = {"kind": kind, **defaults}
    _settings({**defaults, **(overrides or {})}, f"{path}: fisher")
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in _entries(document, path):
        found.setdefault(_model_name(entry, path), []).append(entry)
    base = document.get("base_model")
    if isinstance(base, str):
        found.setdefault(
            _checked(base, path),
            [{"parameters": _mapping(document.get("parameters"), "parameters", path), "is_base": True}],
        )
    if not found:
        raise RecipeError(f"{path} names no models")
    levels = [document, *(level for place in places(document, path) for level in place)]
    bases = {_checked(name, path) for level in levels if isinstance(name := level.get("base_model"), str)}
    return Recipe(
        path,
        document["merge_method"],
        kind,
        tuple(
            _model(name, entries, defaults, overrides or {}, name in bases, path)
            for name, entries in found.items()
        ),
        document,
    )


def _kind(document: dict[str, Any], path: Path) -> Kind | None:
    """What the recipe's method goes by."""
    if document["merge_method"] == DIAGONAL_METHOD:
        return "diagonal"
    if document["merge_method"] != METHOD:
        return None
    kinds: set[Kind] = set()
    for levels in places(document, path):
        nodes = None
        for level in levels[:-1]:  # An entry's own is not read by mergekit: it is one value for all models.
            nodes = _mapping(level.get("parameters"), "parameters", path).get("nodes", nodes)
        if nodes is not None and nodes not in get_args(Nodes):
            raise RecipeError(
                f"{path}: nodes: expected one of {', '.join(get_args(Nodes))} for all tensors alike, "
                f"got {reprlib.repr(nodes)}"
            )
        kinds.add("factored" if nodes == ALL else "mask")
    if len(kinds) > 1:
        raise RecipeError(
            f"{path}: nodes: {ALL} holds for some tensors only; a merge has one kind of sidecars"
        )
    return kinds.pop() if kinds else "mask"


def _model(
    name: str,
    entries: list[dict[str, Any]],
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    is_base: bool,
    path: Path,
) -> RecipeModel:
    """One model from all the places that name it."""
    given = [_mapping(e["fisher"], f"fisher of {name}", path) for e in entries if e.get("fisher") is not None]
    if any(other != given[0] for other in given):
        raise RecipeError(f"{path}: {name} appears twice with different fisher: keys")
    settings, evaluation = _settings(
        {**defaults, **(given[0] if given else {}), **overrides}, f"{path}: fisher of {name}"
    )
    weight, counts = _weight(name, [e for e in entries if not is_empty(e)] or entries, path)
    takes_data = counts or bool(given and given[0].get("data"))
    sidecars = {
        e["parameters"]["sidecar"] for e in entries if isinstance(e["parameters"].get("sidecar"), str)
    }
    if len(sidecars) > 1:
        raise RecipeError(f"{path}: {name} appears with different sidecars: {', '.join(sorted(sidecars))}")
    return RecipeModel(
        name=name,
        settings=settings if settings.data and takes_data else None,
        kind=settings.kind,
        weight=weight,
        counts=counts,
        sidecar=next(iter(sidecars), None) or None,
        is_base=is_base,
        request=settings,
        evaluation=evaluation,
    )


def _weight(
    name: str, entries: list[dict[str, Any]], path: Path
) -> tuple[float | Literal["varies"] | None, bool]:
    """A model's ``weight``, and whether it counts, from the places where it has layers."""
    given = [entry["parameters"].get("weight") for entry in entries]
    # What each amounts to: as the merge has it, that is none of a base model, else 1.
    amounts = {
        (None if entry["is_base"] else 1.0) if weight is None else _number(weight, name, path)
        for weight, entry in zip(given, entries, strict=True)
    }
    weight: float | Literal["varies"] | None = "varies"
    if len(amounts) == 1 and "varies" not in amounts:
        weight = None if all(one is None for one in given) else amounts.pop()
    return weight, amounts != {None}


def _number(weight: Any, name: str, path: Path) -> float | Literal["varies"]:
    """A weight that is one plain number, also as text, as YAML has one without a point and with an exponent."""
    try:
        return float(weight) if isinstance(weight, int | float | str) else "varies"
    except ValueError:
        return "varies"
    except OverflowError as error:
        raise RecipeError(f"{path}: the weight of {name} is larger than a number can be") from error


def is_empty(entry: Mapping[str, Any]) -> bool:
    """Whether it is a source of no layers, which only says where what surrounds the layers comes from."""
    layers = entry.get("layer_range")
    return isinstance(layers, list) and len(layers) == 2 and layers[0] == layers[1]


def places(document: dict[str, Any], path: Path) -> Iterator[tuple[dict[str, Any], ...]]:
    """Every place of a recipe that names an input model, in order, after all that it lies in.

    Each is the document, the module (or the document again), the slice (or the module again), and the entry itself:
    parameters of a later one beat those of an earlier one.

    Raises:
        RecipeError: If one of them is not what a recipe has there.
    """
    for section in (document, *_mapping(document.get("modules"), "modules", path).values()):
        section = _mapping(section, "a module", path)
        slices = [_mapping(part, "a slice", path) for part in _list(section.get("slices"), "slices", path)]
        for part, key in ((section, "models"), *((part, "sources") for part in slices)):
            for entry in _list(part.get(key), key, path):
                yield document, section, part, _mapping(entry, f"an entry of {key}", path)


def _entries(document: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The entries, each with the parameters that hold there, and whether it is the base model there."""
    for levels in places(document, path):
        parameters: dict[str, Any] = {}
        for level in levels:
            parameters |= _mapping(level.get("parameters"), "parameters", path)
        base = levels[-2].get("base_model") or document.get("base_model")
        yield levels[-1] | {"parameters": parameters, "is_base": levels[-1].get("model") == base}


def _model_name(entry: Mapping[str, Any], path: Path) -> str:
    name = entry.get("model")
    if not isinstance(name, str) or not name:
        raise RecipeError(f"{path}: expected 'model: NAME', got {reprlib.repr(entry)}")
    return _checked(name, path)


def _checked(name: str, path: Path) -> str:
    try:
        return checked_name(name)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}, got {reprlib.repr(name)}") from error


def _mapping(value: Any, what: str, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {what} must be a mapping, got {reprlib.repr(value)}")
    return value


def _list(value: Any, what: str, path: Path) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecipeError(f"{path}: {what} must be a list, got {reprlib.repr(value)}")
    return value


def _settings(values: Mapping[str, Any], where: str) -> tuple[FisherSettings, EvaluationSettings]:
    apart = {key: value for key, value in values.items() if key in EvaluationSettings.model_fields}
    rest = {key: value for key, value in values.items() if key not in apart}
    try:
        return FisherSettings.model_validate(rest), EvaluationSettings.model_validate(apart)
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """A pydantic error as one line: which key, what was expected, what was got, which keys there are."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        known = [*FisherSettings.model_fields, *EvaluationSettings.model_fields]
        return f"unknown key '{key}'; known keys: {', '.join(known)}"
    return f"{key + ': ' if key else ''}{first['msg']}" + (f", got {first['input']!r:.80}" if key else "")
