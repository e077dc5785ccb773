"""The tuned recipe as text: the user's own, with other coefficients in it."""

import re
from decimal import Decimal
from io import StringIO
from typing import Any

import yaml

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.recipe import Recipe
from fisher_mask_mergekit.tuning.coefficients import Coefficients, put

_MARK = "# tuned: "


def with_coefficients(recipe: Recipe, coefficients: Coefficients | None) -> dict[str, Any]:
    """The recipe as mergekit takes it, with other coefficients; unchanged without any."""
    document = _unshared(recipe.document)
    if coefficients is not None:
        put(document, coefficients, recipe.path)
    return document


def written(recipe: Recipe, text: str, coefficients: Coefficients | None, notes: list[str]) -> str:
    """The recipe's text with other coefficients, comments and order kept, and notes on top.

    Args:
        recipe: What was read from the text.
        text: The recipe as the user wrote it.
        coefficients: What to put in; None leaves it as it is.
        notes: Lines for the top.

    Raises:
        RecipeError: If the text cannot be changed so that it means what was asked for.
    """
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith(_MARK):  # Of an earlier run, on this recipe's own parent.
        del lines[0]
    body = "".join(lines)
    if coefficients is not None:
        body = _changed(recipe, body, coefficients)
        # An anchor shared by what must differ, for one.
        if yaml.safe_load(body) != with_coefficients(recipe, coefficients):
            raise RecipeError(
                f"{recipe.path}: cannot write its coefficients without changing more; "
                "write its models out, without anchors (&) and aliases (*)"
            )
    return "".join(f"{_MARK}{note}\n" for note in notes) + body


def _changed(recipe: Recipe, text: str, coefficients: Coefficients) -> str:
    from ruamel.yaml import YAML, RoundTripRepresenter
    from ruamel.yaml.error import YAMLError

    class Representer(RoundTripRepresenter):
        """Numbers without exponents, which YAML 1.1 takes for text where they have no point."""

    Representer.add_representer(
        float,
        lambda representer, value: representer.represent_scalar(
            "tag:yaml.org,2002:float", format(Decimal(repr(value)), "f")
        ),
    )
    editor = YAML()
    editor.Representer = Representer
    editor.preserve_quotes = True
    editor.width = 1 << 16
    if (first := re.search(r"^( *)- ", text, re.MULTILINE)) and first[1]:
        editor.indent(mapping=2, sequence=4, offset=2)
    try:
        document = editor.load(text)
    except YAMLError as error:  # It is stricter: a key given twice, for one.
        raise RecipeError(f"{recipe.path} is not YAML: {' '.join(str(error).split())}") from error
    put(document, coefficients, recipe.path)
    out = StringIO()
    editor.dump(document, out)
    return out.getvalue()


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object, as aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value
