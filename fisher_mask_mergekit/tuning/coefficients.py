"""What is tuned of a recipe: each model's lambda, ``normalize`` and ``prior``; read from it, and put into it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.recipe import DIAGONAL_METHOD, METHOD, Recipe, RecipeModel, is_empty, places

LINEAR = "linear"
OCTAVES = 4
"""How far a lambda may be from the first model's, and ``prior`` from the recipe's: by a factor of 2 to this power, either way."""


@dataclass(frozen=True)
class Coefficients:
    """Values of what is tuned.

    Attributes:
        weights: Lambda of every model that the recipe gives one, by name; 0 for those that stay out.
        normalize: The method's ``normalize``; None for a method whose scores it does not change.
        prior: The method's ``prior``; None where there is none, or not one plain number.
    """

    weights: Mapping[str, float]
    normalize: str | None
    prior: float | None = None

    @property
    def counted(self) -> list[str]:
        """The models that are merged, the one first whose lambda the others are told by."""
        return [name for name, weight in self.weights.items() if weight > 0]

    @property
    def octaves(self) -> dict[str, float]:
        """Log2 of each counted lambda over the first; not the first's own, which is 0."""
        first, *others = self.counted
        return {name: math.log2(self.weights[name] / self.weights[first]) for name in others}

    def at(
        self, octaves: Mapping[str, float], normalize: str | None, prior_octave: float = 0.0
    ) -> "Coefficients":
        """The same models with other lambdas, and ``prior`` so many octaves up; short enough to read in a recipe."""
        first = self.weights[self.counted[0]]
        moved = {name: _short(first * 2**octave) for name, octave in octaves.items()}
        prior = _short(self.prior * 2**prior_octave) if self.prior and prior_octave else self.prior
        return Coefficients({**self.weights, **moved}, normalize, prior)


def read_coefficients(recipe: Recipe) -> Coefficients:
    """The recipe's own.

    Raises:
        RecipeError: If its method is none that can be tuned, a weight or ``normalize`` is not one plain value, or
            fewer than two models count.
    """
    where, method = recipe.path, recipe.method
    if method not in (METHOD, DIAGONAL_METHOD, LINEAR):
        raise RecipeError(f"{where}: tune knows {METHOD}, {DIAGONAL_METHOD} and {LINEAR}, not {method}")
    weights = {}
    inside = {str(levels[-1].get("model")) for levels in places(dict(recipe.document), where)
              if not is_empty(levels[-1])}  # fmt: skip
    for model in recipe.models:
        if (model.name in inside or model.is_base) and (weight := _weight(model, where)) is not None:
            weights[model.name] = weight
    given = _shared(recipe, "normalize")
    if method == LINEAR:
        if given not in (None, True):
            raise RecipeError(
                f"{where}: linear with normalize: {given}: tune keeps the scale of the weights; remove it"
            )
        found = Coefficients(weights, None)
    else:
        normalize = "none" if given is None else given
        if normalize not in normalizations(recipe):
            known = ", ".join(normalizations(recipe))
            raise RecipeError(
                f"{where}: normalize is {normalize!r}; tune takes one plain name for the whole merge: {known}"
            )
        found = Coefficients(weights, normalize, _positive(_shared(recipe, "prior")))
    if len(found.counted) < 2:
        raise RecipeError(
            f"{where}: only {len(found.counted)} of its models have a weight above 0; there is nothing to tune"
        )
    return found


def _weight(model: RecipeModel, where: Path) -> float | None:
    """A model's lambda; None for a base that only surrounds the merge."""
    if model.weight == "varies":
        raise RecipeError(
            f"{where}: the weight of {model.name} is not one plain number (a filter, a gradient, or different in "
            "different places); tune moves one number per model"
        )
    weight = (1.0 if model.counts else None) if model.weight is None else model.weight
    if weight is not None and not 0 <= weight < math.inf:
        raise RecipeError(f"{where}: weight of {model.name} is {weight}; expected a number of 0 or more")
    return weight


def _positive(given: Any) -> float | None:
    """A number above 0, also as text, as YAML has one without a point and with an exponent; None if it is none."""
    try:
        number = float(given) if isinstance(given, int | float | str) else 0.0
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _shared(recipe: Recipe, name: str) -> Any:
    """A parameter of the recipe's, wherever it is given; a list of all its values if it is not one for the whole merge."""
    found: list[Any] = []
    for levels in places(dict(recipe.document), recipe.path):
        value = None
        for level in levels[:-1]:  # An entry's own is not read by mergekit: it is one value for all models.
            value = (level.get("parameters") or {}).get(name, value)
        found += [] if value in found else [value]
    return found[0] if len(found) == 1 else found


def normalizations(recipe: Recipe) -> tuple[str, ...]:
    """What ``normalize`` can be; nothing for a method that has no such choice."""
    if recipe.method == LINEAR:
        return ()
    from fisher_mask_mergekit.parameter_merge import NormalizeParameters
    from fisher_mask_mergekit.weighting import Normalize

    known = get_args(Normalize if recipe.kind == "mask" else NormalizeParameters)
    return tuple(one for one in known if not (recipe.has_prior and one == "none"))


def starts(own: Coefficients, choices: Sequence[str]) -> list[Coefficients]:
    """What is tried first: the recipe as it is, then equal lambdas with every other ``normalize``."""
    equal = [own.at(dict.fromkeys(own.octaves, 0.0), choice) for choice in choices or (None,)]
    return [own, *(one for one in equal if one != own)]


def put(document: Any, coefficients: Coefficients, path: Path) -> None:
    """Put coefficients into a recipe, in place; what else is in it stays.

    Entries of no layers keep their weights: they only say where what surrounds the layers comes from.

    Args:
        document: The recipe as plain or commented YAML has it, nothing in it shared by an alias.
        coefficients: Of the recipe's models.
        path: The recipe, for messages.
    """
    base = document.get("base_model")
    for levels in places(document, path):
        entry = levels[-1]
        if not is_empty(entry) and entry["model"] in coefficients.weights:
            _parameters(entry)["weight"] = coefficients.weights[entry["model"]]
    # Where nothing names the base model, the recipe's own parameters are its.
    if base in coefficients.weights and "weight" in (document.get("parameters") or {}):
        document["parameters"]["weight"] = coefficients.weights[base]
    lower = [level for levels in places(document, path) for level in levels[1:-1] if level is not document]
    for name, value in (("normalize", coefficients.normalize), ("prior", coefficients.prior)):
        if value is None:
            continue
        given = [level["parameters"] for level in lower if name in (level.get("parameters") or {})]
        for parameters in given:
            parameters.pop(name, None)
        if given or value != "none" or name in (document.get("parameters") or {}):
            _parameters(document)[name] = value


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _parameters(level: Any) -> Any:
    """A level's parameters, made if there are none, of its own kind of mapping."""
    if level.get("parameters") is None:
        level["parameters"] = type(level)()
    return level["parameters"]
