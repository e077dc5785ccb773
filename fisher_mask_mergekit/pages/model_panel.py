"""A model's panel: what was measured and how, and its Fisher information as pictures with their numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from fisher_mask_mergekit.pages.canvas import Limits, log_limits
from fisher_mask_mergekit.pages.fisher_numbers import LEVELS, Nodes, nodes_of, quantiles
from fisher_mask_mergekit.pages.fisher_pictures import box_plot, heat_map
from fisher_mask_mergekit.pages.html import Html, Section, element, figure, joined, number, sentence, table
from fisher_mask_mergekit.pages.text import clean
from fisher_mask_mergekit.preview.printout import metadata_fields
from fisher_mask_mergekit.sidecar import Sidecar

_MOST_PICTURES = 24  # Of a model; more kinds of layers than any architecture has.


@dataclass(frozen=True)
class Panel:
    """What a panel is about.

    Attributes:
        name: The model's, fit to be a heading.
        sidecar: Its measurement.
        lacks: Why there is none.
    """

    name: str
    sidecar: Sidecar | None
    lacks: str = ""


def model_sections(panels: Sequence[Panel]) -> list[Section]:
    """A section per model. One kind of node has the same scale in all of them.

    Args:
        panels: In the order of the page.
    """
    nodes = [nodes_of(panel.sidecar) if panel.sidecar else [] for panel in panels]
    vectors: dict[str, list[numpy.ndarray]] = {}
    for one in (one for found in nodes for one in found):
        shown = (
            [numpy.array(layer.levels) for layer in quantiles(one.layers)]
            if one.what == "neurons"
            else one.layers.values()
        )
        vectors.setdefault(one.what, []).extend(shown)
    scales = {what: log_limits(found) for what, found in vectors.items()}
    return [
        Section(f"model-{place}", panel.name, _body(panel, found, scales, f"model-{place}"), "model")
        for place, (panel, found) in enumerate(zip(panels, nodes, strict=True), 1)
    ]


def _body(panel: Panel, nodes: Sequence[Nodes], scales: Mapping[str, Limits], anchor: str) -> Html:
    if panel.sidecar is None:
        return element("p", f"No Fisher information to show: {panel.lacks}", class_="note")
    shown = nodes[:_MOST_PICTURES]
    pictures = [
        _figure(one, panel.name, scales[one.what], f"{anchor}-{place}", [other.what for other in shown])
        for place, one in enumerate(shown, 1)
    ]
    parts = [_provenance(panel.sidecar), element("div", joined(pictures), class_="pictures")]
    if left := len(nodes) - len(shown):
        parts.append(element("p", f"{left} more kinds of layers are not shown.", class_="note"))
    return joined(parts)


def _provenance(sidecar: Sidecar) -> Html:
    fields = {"sidecar": sidecar.source} | metadata_fields(sidecar.metadata)
    return element(
        "dl", joined(Html(element("dt", name) + element("dd", value)) for name, value in fields.items())
    )


def _figure(nodes: Nodes, name: str, limits: Limits, prefix: str, kinds: Sequence[str]) -> Html:
    template = clean(nodes.template, 120)
    # The template tells apart what would be called the same: self-attention and cross-attention, say.
    what = nodes.what if kinds.count(nodes.what) == 1 else f"{nodes.what} before {template}"
    draw = _neurons if nodes.what == "neurons" else _heads
    picture, caption, numbers = draw(nodes, f"{nodes.what} of {name}, before {template}", limits, prefix)
    return figure(what[0].upper() + what[1:], picture, caption, numbers, f"{what}, of {name}")


def _heads(nodes: Nodes, about: str, limits: Limits, prefix: str) -> tuple[Html, Html, Html]:
    """A heat map of heads, key-value heads or experts, what it shows, and its numbers."""
    values = numpy.concatenate(list(nodes.layers.values()))
    layer = max(nodes.layers, key=lambda layer: nodes.layers[layer].max())
    each = nodes.what.removesuffix("s")
    label = (
        f"Heat map: Fisher information of {about}. {len(nodes.layers)} layers; from {values.min():.2e} to "
        f"{values.max():.2e} nats squared, the largest in layer {clean(layer, 80)}, {each} "
        f"{nodes.layers[layer].argmax()}."
    )
    zeros = int((values == 0).sum())
    grey = f" Grey is exactly 0: {zeros} of {len(values)}." if zeros else ""
    masks = "neuron masks, mean of each expert" if nodes.what == "experts" else f"{each} masks"
    caption = sentence(
        f"Fisher information of the {masks} (nats²), layers by {nodes.what}, before ",
        nodes.template,
        f". The same logarithmic scale for all models.{grey}",
    )
    head = ["layer", *(f"{each} {place}" for place in range(nodes.most))]
    blank = [Html("")] * nodes.most
    rows = [[name, *[*map(number, vector), *blank][: nodes.most]] for name, vector in nodes.layers.items()]
    numbers = table(f"Fisher information of {about} (nats²)", head, rows)
    return heat_map(nodes, limits, prefix, label), caption, numbers


def _neurons(nodes: Nodes, about: str, limits: Limits, prefix: str) -> tuple[Html, Html, Html]:
    """The distribution of neurons in each layer, what it shows, and its numbers."""
    layers = quantiles(nodes.layers)
    medians = [layer.levels[2] for layer in layers if layer.levels]
    span = f"medians from {min(medians):.2e} to {max(medians):.2e} nats squared" if medians else "all 0"
    label = f"Box plot: Fisher information of {about}, {len(layers)} layers; {span}."
    zeros, count = sum(layer.zeros for layer in layers), sum(layer.count for layer in layers)
    left_out = f" Left out: {zeros} of {count} neurons, which have exactly 0." if zeros else ""
    caption = sentence(
        "Fisher information of the neuron masks (nats²), layer by layer, before ",
        nodes.template,
        f". Boxes: median and quartiles; whiskers from 5 % to 95 %. The same axis for all models.{left_out}",
    )
    head = ["layer", "neurons", "exactly 0", "mean", *(f"{level} %" for level in LEVELS)]
    undefined = [math.nan] * len(LEVELS)
    rows = [
        [layer.layer, *map(number, (layer.count, layer.zeros, layer.mean, *(layer.levels or undefined)))]
        for layer in layers
    ]
    numbers = table(
        f"Fisher information of {about} (nats²): mean of all, quantiles of those above 0", head, rows
    )
    return box_plot(layers, limits, prefix, label), caption, numbers
