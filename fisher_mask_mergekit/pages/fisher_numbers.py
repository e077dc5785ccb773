"""The numbers that pictures of a sidecar show, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import Kind, Node, Site, layer_of, name_template

LEVELS = (5, 25, 50, 75, 95)
"""Per cent of the neurons that are below: the ends of the whiskers and of the box, and the line in it."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Mask nodes of one kind before output projections whose names differ in numbers only.

    Attributes:
        what: ``heads``, ``key-value heads``, ``neurons`` or ``experts``.
        template: The output projections' name.
        layers: Layer to Fisher vector, in the checkpoint's order; of experts, the means over their neurons.
    """

    what: str
    template: str
    layers: Mapping[str, numpy.ndarray]

    @property
    def most(self) -> int:
        """How many there are in the layer that has most."""
        return max(len(vector) for vector in self.layers.values())


@dataclass(frozen=True)
class Quantiles:
    """The Fisher information of a layer's neurons.

    Attributes:
        layer: Its name.
        count: How many neurons.
        zeros: How many of them are exactly zero.
        mean: Of all.
        levels: At :data:`LEVELS`, of those above zero; empty if there is none.
    """

    layer: str
    count: int
    zeros: int
    mean: float
    levels: tuple[float, ...]


def nodes_of(sidecar: Sidecar) -> list[Nodes]:
    """All of a sidecar's mask nodes, in its order; key-value heads where they are not the heads."""
    found: dict[tuple[str, str], dict[str, numpy.ndarray]] = {}
    for site in sidecar.metadata.sites:
        for what, vector in _vectors(site, sidecar).items():
            found.setdefault((what, name_template(site.output)), {})[site.output] = vector
    return [
        Nodes(what, template, dict(zip(layer_names(list(vectors)), vectors.values(), strict=True)))
        for (what, template), vectors in found.items()
    ]


def _vectors(site: Site, sidecar: Sidecar) -> dict[str, numpy.ndarray]:
    fisher = {node: vector.numpy() for node, vector in sidecar.fisher[site.output].items()}
    if site.kind == "ffn":
        neurons = fisher["neuron_fisher"]
        means = {"experts": neurons.astype(float).mean(1)} if site.experts else {}
        return {"neurons": neurons.flatten()} | means
    grouped = {"key-value heads": fisher["kv_head_fisher"]} if site.kv_heads != site.heads else {}
    return {"heads": fisher["head_fisher"]} | grouped


def layers_of(sidecar: Sidecar, kind: Kind, node: Node) -> dict[str, numpy.ndarray]:
    """Layer to Fisher vector, of all output projections of a kind, in the checkpoint's order."""
    outputs = [site.output for site in sidecar.metadata.sites if site.kind == kind]
    vectors = [sidecar.fisher[output][node].flatten().numpy() for output in outputs]
    return dict(zip(layer_names(outputs), vectors, strict=True))


def layer_names(outputs: Sequence[str]) -> list[str]:
    """The shortest that tells output projections apart: a number, several, what only some have, the full name."""
    templates = {name_template(output) for output in outputs}
    common = set.intersection(*(set(output.split(".")) for output in outputs)) if outputs else set()
    shorter: tuple[Callable[[str], str], ...] = (
        lambda name: layer_of(name) or name,
        lambda name: ".".join(
            part for part in name.split(".") if part.isdigit() or (len(templates) > 1 and part not in common)
        ),
    )
    for shortened in shorter:
        names = [shortened(output) for output in outputs]
        if len(set(names)) == len(names):
            return names
    return list(outputs)


def quantiles(layers: Mapping[str, numpy.ndarray]) -> list[Quantiles]:
    """Of each layer."""
    found = []
    for layer, vector in layers.items():
        values = vector.astype(float)
        positive = values[values > 0]
        levels = numpy.percentile(positive, LEVELS).tolist() if len(positive) else ()
        zeros = len(values) - len(positive)
        found.append(Quantiles(layer, len(values), zeros, float(values.mean()), tuple(levels)))
    return found
