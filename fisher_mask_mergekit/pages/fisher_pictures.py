"""Pictures of sidecars: where the Fisher information of a checkpoint's mask nodes is."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fisher_mask_mergekit.errors import FisherMaskError
from fisher_mask_mergekit.pages.canvas import (
    MISSING,
    Limits,
    canvas,
    colour_bar,
    inline_svg,
    log_limits,
    name_powers,
    style,
    ticks,
)
from fisher_mask_mergekit.pages.fisher_numbers import Nodes, Quantiles, layers_of, quantiles
from fisher_mask_mergekit.pages.html import Html
from fisher_mask_mergekit.pages.text import clean
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.store import write_result

_UNIT = "Fisher information (nats²)"
_MOST_PIXELS = 20_000  # Of a PNG's width; viewers and matplotlib itself give up at 65,536.
_LONGEST = 32  # Characters of a layer's name.
_BOX = "#5b8cc4"  # Between the lightest and the darkest ground.


def head_fisher_map(sidecars: Mapping[str, Sidecar], path: Path) -> None:
    r"""Draw the Fisher information of several checkpoints' mask nodes, one column per checkpoint.

    Above, :math:`I_{ii}` of each head mask, layers by heads, in nats squared, on one logarithmic colour scale
    for all; grey is exactly 0, or no such head. Below, the distribution of the neuron masks'
    per layer: quartiles, and whiskers from the 5th to the 95th percentile, zeros left out.

    Args:
        sidecars: Title to sidecar, from left to right.
        path: Where to write a PNG; written under a temporary name, then renamed.

    Raises:
        FisherMaskError: If there is no sidecar, or the file cannot be written.
    """
    if not sidecars:
        raise FisherMaskError("there is no sidecar to draw")
    buffer = io.BytesIO()
    with style(for_page=False):
        figure = _columns(sidecars)
        figure.savefig(buffer, format="png", dpi=min(150, _MOST_PIXELS / figure.get_figwidth()))
    write_result(path, buffer.getvalue())


def _columns(sidecars: Mapping[str, Sidecar]) -> Figure:
    heads = {title: layers_of(sidecar, "attention", "head_fisher") for title, sidecar in sidecars.items()}
    neurons = {title: layers_of(sidecar, "ffn", "neuron_fisher") for title, sidecar in sidecars.items()}
    most_heads = max((len(v) for layers in heads.values() for v in layers.values()), default=1)
    most_layers = max(len(layers) for layers in heads.values())
    width = min(max(3.6, 0.35 * most_heads, 0.2 * most_layers), 8)
    height = min(1.6 + 0.4 * most_layers, 9)
    beside = 0.08 * max(len(clean(name, _LONGEST)) for layers in heads.values() for name in [*layers, ""])
    figure = Figure(figsize=((width + beside) * len(sidecars) + 1.2, height + 3), layout="constrained")
    axes = figure.subplots(2, len(sidecars), squeeze=False, height_ratios=[height, 3])
    limits = log_limits(vector for layers in heads.values() for vector in layers.values())
    for column, (title, sidecar) in enumerate(sidecars.items()):
        upper, lower = axes[:, column]
        upper.set_title(f"{clean(title, int(8 * width))}\n{sidecar.metadata.samples} samples")
        image = _draw_heads(upper, heads[title], limits)
        upper.set_xlabel("head")
        if column:
            lower.sharey(axes[1, 0])
            lower.tick_params(labelleft=False)
        _draw_neurons(lower, found := quantiles(neurons[title]))
        if zeros := sum(layer.zeros for layer in found):
            total = sum(layer.count for layer in found)
            lower.set_title(f"{zeros} of {total} neurons have exactly 0", fontsize="small")
    bar = figure.colorbar(image, ax=list(axes[0]), label="Fisher information\nof the head mask (nats²)")
    name_powers(bar.ax.yaxis)
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("Fisher information\nof neuron masks (nats²)")
    figure.supxlabel(
        "grey heads: exactly 0, or no such head; boxes: median and quartiles, whiskers from 5 % to 95 %",
        fontsize="small",
        color="0.3",
    )
    return figure


def heat_map(nodes: Nodes, limits: Limits, prefix: str, label: str) -> Html:
    """Heads or experts, layers by nodes.

    Args:
        nodes: What to draw.
        limits: Of the colours.
        prefix: Of the picture's ids.
        label: What someone who cannot see it is told.
    """
    with style(for_page=True):
        figure, axis = canvas(1.3 + min(max(0.28 * len(nodes.layers), 0.5), 6))
        image = _draw_heads(axis, nodes.layers, limits)
        axis.set_xlabel(nodes.what.removesuffix("s"))
        axis.set_ylabel("layer")
        colour_bar(figure, axis, image, _UNIT)
        return inline_svg(figure, prefix, label)


def box_plot(layers: Sequence[Quantiles], limits: Limits, prefix: str, label: str) -> Html:
    """The distribution of neurons, layer by layer.

    Args:
        layers: What to draw.
        limits: Of the axis.
        prefix: Of the picture's ids.
        label: What someone who cannot see it is told.
    """
    with style(for_page=True):
        figure, axis = canvas(2.8)
        _draw_neurons(axis, layers)
        axis.set_ylim(limits[0] / 1.5, limits[1] * 1.5)
        axis.set_ylabel(_UNIT)
        return inline_svg(figure, prefix, label)


def _draw_heads(axis: Any, layers: Mapping[str, numpy.ndarray], limits: Limits) -> Any:
    """Layers by heads, the first layer at the top."""
    count = max((len(vector) for vector in layers.values()), default=1)
    matrix = numpy.full((max(len(layers), 1), count), numpy.nan)
    for row, vector in zip(matrix, layers.values(), strict=False):
        row[: len(vector)] = vector
    image = axis.imshow(
        numpy.ma.masked_where(~(matrix > 0), matrix),
        cmap=colormaps["viridis"].with_extremes(bad=MISSING),
        norm=LogNorm(*limits),
        aspect="auto",
        interpolation="none",
    )
    axis.set_xticks(ticks(count))
    _name_layers(axis.yaxis, list(layers))
    return image


def _draw_neurons(axis: Any, layers: Sequence[Quantiles]) -> None:
    """One box per layer with a neuron above zero."""
    drawn = {place: layer for place, layer in enumerate(layers) if layer.levels}
    ink = axis.xaxis.label.get_color()
    axis.bxp(
        [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), layer.levels, strict=True))
            for layer in drawn.values()
        ],
        positions=list(drawn),
        widths=0.6,
        showfliers=False,
        medianprops={"color": ink, "linewidth": 1.5},
        whiskerprops={"color": ink},
        capprops={"color": ink},
        boxprops={"facecolor": _BOX, "edgecolor": ink},
        patch_artist=True,
        manage_ticks=False,
    )
    axis.set_xlim(-0.6, max(len(layers), 1) - 0.4)
    axis.set_yscale("log")
    name_powers(axis.yaxis)
    axis.grid(axis="y", color=ink, alpha=0.15)
    axis.set_axisbelow(True)
    axis.set_xlabel("layer")
    _name_layers(axis.xaxis, [layer.layer for layer in layers])


def _name_layers(axis: Any, layers: Sequence[str]) -> None:
    """Ticks with the layers' names, slanted where they would run into each other below a picture."""
    places = ticks(len(layers))
    names = [clean(layers[place], _LONGEST) for place in places]
    is_wide = axis.axis_name == "x" and sum(map(len, names)) > 40
    axis.set_ticks(places, names, **({"rotation": 45, "ha": "right"} if is_wide else {}))
