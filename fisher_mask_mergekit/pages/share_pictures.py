"""Pictures of a recipe: each model's share of what the merge weighs, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.figure import Figure

from fisher_mask_mergekit.pages.canvas import INK, canvas, colour_bar, inline_svg, style, ticks
from fisher_mask_mergekit.pages.fisher_numbers import layer_names
from fisher_mask_mergekit.pages.html import Html, element
from fisher_mask_mergekit.pages.text import clean
from fisher_mask_mergekit.preview.inspection import ShareStatistics

# Told apart by those who see few colours, and from both grounds. There are no seven such.
_COLOURS = ("#3b78b8", "#e08a1e", "#2a9d5c", "#c8507e", "#8f6fc9", "#b5a13a")
_LEAST_NAMED = 0.07  # Of a bar's height: a number needs as much room.


def legend(names: Sequence[str]) -> Html:
    """Which number, and which colour if there are enough, stands for which model.

    Args:
        names: Of the models, in the order in which they are drawn.
    """
    entries = (
        element("li", _swatch(place, len(names)), Html(f"[{place + 1}] "), element("bdi", name))
        for place, name in enumerate(names)
    )
    return element("ul", Html("".join(entries)), class_="legend")


def _swatch(place: int, count: int) -> Html:
    if count > len(_COLOURS):
        return Html("")
    return element("span", class_="swatch", style=f"background: {_COLOURS[place]}", aria_hidden="true")


def share_picture(rows: Sequence[ShareStatistics], models: Sequence[str], prefix: str, label: str) -> Html:
    """Each model's mean share, layer by layer: stacked bars, or layers by models where there are many.

    Args:
        rows: Tensors of one kind, layer by layer.
        models: In the order of the legend.
        prefix: Of the picture's ids.
        label: What someone who cannot see it is told.
    """
    shares = numpy.array([[row.shares.get(model, (0.0,))[0] for model in models] for row in rows])
    names = layer_names([row.tensors[0] for row in rows])
    places = ticks(len(rows))
    shown = [clean(names[place], 24) for place in places]
    with style(for_page=True):
        if len(models) > len(_COLOURS):
            figure, axis = canvas(1.3 + min(max(0.28 * len(rows), 0.5), 6))
            _draw_map(figure, axis, shares)
            axis.set_yticks(places, shown)
            axis.set_ylabel("layer")
        else:
            figure, axis = canvas(2.6)
            _draw_bars(axis, shares)
            axis.set_xticks(places, shown)
            axis.set_xlabel("layer")
        return inline_svg(figure, prefix, label)


def _draw_bars(axis: Any, shares: numpy.ndarray) -> None:
    """One bar per layer, the first model at the bottom; to the right of the last, the models' numbers."""
    count = len(shares)
    ends = shares.cumsum(1)
    for place in range(shares.shape[1]):
        heights, bottom = shares[:, place], ends[:, place] - shares[:, place]
        axis.bar(range(count), heights, bottom=bottom, width=0.86, color=_COLOURS[place], linewidth=0)
        if heights[-1] >= _LEAST_NAMED:
            middle = bottom[-1] + heights[-1] / 2
            axis.annotate(
                f"[{place + 1}]", (1, middle), xycoords=("axes fraction", "data"), va="center", fontsize=9
            )
    if shares.shape[1] == 2:
        axis.axhline(0.5, color=INK, alpha=0.35, linewidth=0.8, linestyle="--")
    axis.set_xlim(-0.6, count - 0.4)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of the merge")


def _draw_map(figure: Figure, axis: Any, shares: numpy.ndarray) -> None:
    """Layers by models, the first layer at the top."""
    image = axis.imshow(shares, cmap="viridis", vmin=0, aspect="auto", interpolation="none")
    places = ticks(shares.shape[1])
    axis.set_xticks(places, [f"[{place + 1}]" for place in places])
    axis.set_xlabel("model")
    colour_bar(figure, axis, image, "share of the merge")
