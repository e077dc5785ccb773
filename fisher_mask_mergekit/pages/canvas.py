"""What all pictures share: matplotlib set up for a page or for a file, and a figure as inline SVG."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
import numpy
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter

from fisher_mask_mergekit.pages.html import Html
from fisher_mask_mergekit.pages.text import clean

Limits = tuple[float, float]
"""The lowest and the highest value of a scale."""
WIDTH = 4.4
"""Of a page's pictures in inches: on a phone they are shrunk a little only, so their text can be read."""
INK = "#010203"
"""Stands for the page's own text colour, whichever that is."""
_EXTREMES = 1e-280, 1e280  # Beyond, matplotlib takes a scale for one of zeros, or overflows.
MISSING = "0.7"
"""A grey that is told from both backgrounds: zero has no place on a logarithmic scale."""

_REFERENCE = re.compile(r"(^#|url\(#)([\w.-]+)")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Names may hold dollars, which are no formulas here.
_STYLE = {"text.parse_math": False, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_CLEAR = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")


@contextmanager
def style(*, for_page: bool) -> Iterator[None]:
    """Draw the same whatever the user's own matplotlib settings are.

    Args:
        for_page: With a transparent ground and the page's text colour; else black on white.
    """
    chosen: dict[str, Any] = dict(_STYLE)
    if for_page:
        chosen |= dict.fromkeys(_INKED, INK) | dict.fromkeys(_CLEAR, "none")
        chosen |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.style.context(["default", chosen]), warnings.catch_warnings():
        # A script that the font lacks is drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(height: float) -> tuple[Figure, Any]:
    """A page's picture with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


class Powers(Formatter):
    """Ticks of a logarithmic scale: powers of ten; where there are few, twice and five times those; else all."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The text of one tick."""
        if x <= 0:
            return ""
        axis: Any = self.axis
        low, high = axis.get_view_interval()
        decades = abs(math.log10(high / low))
        leading = f"{x:.5e}".partition("e")[0].rstrip("0.")
        is_named = leading == "1" or (decades < 1.5 and leading in "25") or decades < 0.4
        return plain_power(x) if is_named else ""


def plain_power(x: float) -> str:
    """A positive number as 10⁻³, 2·10⁻³ or 0.2, in plain text that any font can show."""
    mantissa, _, power = f"{x:.2e}".partition("e")
    if -2 <= int(power) <= 3:
        return f"{float(f'{x:.2e}'):g}"
    mantissa = mantissa.rstrip("0").rstrip(".")
    return ("" if mantissa == "1" else f"{mantissa}·") + "10" + str(int(power)).translate(_SUPERSCRIPTS)


def log_limits(vectors: Iterable[numpy.ndarray]) -> Limits:
    """The ends of a logarithmic scale over all positive values, at least a factor of 2 either side of one."""
    positive = numpy.concatenate([*vectors, numpy.zeros(0)])
    positive = positive[positive > 0].clip(*_EXTREMES)
    if len(positive) == 0:
        return 0.5, 2.0
    low, high = float(positive.min()), float(positive.max())
    return (low, high) if high > low else (low / 2, high * 2)


def ticks(count: int) -> list[int]:
    """At most a dozen evenly spaced positions, the first included."""
    return list(range(0, count, max(1, -(-count // 12))))


def colour_bar(figure: Figure, axis: Any, image: Any, label: str) -> None:
    """What the colours mean, above a heat map: beside it, a phone has no room.

    Args:
        figure: The heat map's.
        axis: The heat map's.
        image: The heat map.
        label: What is measured, and in what.
    """
    bar = figure.colorbar(
        image, ax=axis, location="top", aspect=40, pad=0.12 / figure.get_figheight(), label=label
    )
    if isinstance(image.norm, LogNorm):
        name_powers(bar.ax.xaxis)
        low, high = image.get_clim()
        if high < 100 * low:  # Too few powers of ten to read it by.
            ends = numpy.geomspace(low, high, 3).tolist()
            bar.set_ticks(ends, labels=[plain_power(end) for end in ends])
            bar.minorticks_off()
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # Else 256 little rectangles with seams between them.


def name_powers(axis: Any) -> None:
    """Ticks of a logarithmic axis in plain text, also those between the powers of ten."""
    axis.set_major_formatter(Powers())
    axis.set_minor_formatter(Powers())


def inline_svg(figure: Figure, prefix: str, label: str) -> Html:
    """A figure as an ``svg`` element to be put into a page.

    Args:
        figure: Drawn with :func:`style` for a page.
        prefix: Of the ids in it; another for each picture of a page.
        label: What someone who cannot see it is told.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):  # Who made it, and a style that would hold for the whole page.
        if child.tag.endswith("metadata") or child.find("{*}style") is not None:
            root.remove(child)
    ids: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        return found[1] + ids.setdefault(found[2], f"{prefix}-{len(ids) + 1}")

    for node in root.iter():
        node.tag, node.tail = node.tag.rpartition("}")[2], None
        node.attrib = {
            name.rpartition("}")[2]: _REFERENCE.sub(renamed, value.replace(INK, "currentColor"))
            for name, value in node.attrib.items()
        }
    for node in root.iter():
        if (old := node.attrib.pop("id", None)) in ids:
            node.set("id", ids[old])
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": clean(label)}
    return Html(ElementTree.tostring(root, encoding="unicode"))
