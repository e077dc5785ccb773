"""Ways to merge, as recipes say them: which method, with which parameters, and what is measured for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fisher_mask_mergekit.settings import FisherSettings

MOST_EXACT = 8
"""Labels up to which the full Fisher information is the exact expectation over all of them; beyond, one is drawn from
the model for each sample: every label costs a backward pass."""


@dataclass(frozen=True)
class Way:
    """One way to merge.

    Attributes:
        name: What tables call it.
        method: As a recipe names it.
        parameters: For the whole merge.
        each: For every model.
        measured: What is measured for it, beside the recipe's own settings; None if nothing is.
        with_parent: Whether the models' common parent is the base model.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    with_parent: bool = False

    def settings(self, request: FisherSettings, labels: int) -> FisherSettings:
        """What is measured of a model with so many labels."""
        wanted = dict(self.measured or {})
        if wanted.get("labels") == "exact" and labels > MOST_EXACT:
            wanted["labels"] = "sampled"
        return FisherSettings.model_validate(request.model_dump() | wanted)


AVERAGE = Way("average", "linear")


def mask(name: str, parameters: Mapping[str, Any] | None = None, **measured: Any) -> Way:
    """A merge by the Fisher information of mask nodes."""
    return Way(name, "fisher_mask", parameters or {}, measured={"kind": "mask", **measured})


def diagonal(name: str, parameters: Mapping[str, Any] | None = None, **measured: Any) -> Way:
    """A merge by the full diagonal Fisher information."""
    return Way(name, "fisher_diagonal", parameters or {}, measured={"kind": "diagonal", **measured})


def factored(name: str, parameters: Mapping[str, Any] | None = None, **measured: Any) -> Way:
    """A merge by the Fisher information of rows and columns of every parameter."""
    return Way(
        name, "fisher_mask", {"nodes": "all", **(parameters or {})}, measured={"kind": "factored", **measured}
    )


MASK, COLUMNS = mask("masks"), mask("columns", {"nodes": "columns"})
ALL, DIAGONAL = factored("all"), diagonal("diagonal")


def by_tensor(way: Way) -> Way:
    """The same, each tensor's Fisher information over its mean."""
    return replace(way, parameters={**way.parameters, "normalize": "tensor"})


def normalized(way: Way, kind: str) -> Way:
    """The same with ``normalize``."""
    return replace(
        way, name=f"{way.name}, normalize {kind}", parameters={**way.parameters, "normalize": kind}
    )


def from_parent(way: Way, prior: float) -> Way:
    """The same from the models' common parent, each tensor's Fisher information over its mean."""
    parameters = {**by_tensor(way).parameters, "prior": prior}
    return replace(way, name=f"{way.name}, prior {prior:g}", parameters=parameters, with_parent=True)


def clipped(way: Way) -> Way:
    """The same within the range that the parent and the models span."""
    return replace(way, name=f"{way.name}, clip", parameters={**way.parameters, "clip": True})


def arithmetic(weight: float) -> Way:
    """The parent and so much of every change."""
    each = {"weight": weight}
    return Way(f"task_arithmetic {weight}", "task_arithmetic", {"normalize": False}, each, with_parent=True)


WITHOUT_DATA = (
    # What their papers recommend where nothing can be tuned; 0.7 is near what equal Fisher information gives two models from
    # their parent. The disjoint mean of TIES is mergekit's `normalize`.
    *map(arithmetic, (0.4, 0.7)),
    Way("ties", "ties", {"normalize": True}, {"weight": 1.0, "density": 0.2}, with_parent=True),
    Way("dare_ties", "dare_ties", {"normalize": True}, {"weight": 1.0, "density": 0.5}, with_parent=True),
    Way("model_stock", "model_stock", with_parent=True),
    Way("karcher", "karcher"),
)
