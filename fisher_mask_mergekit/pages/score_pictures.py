"""Pictures of scores: merges side by side, with their intervals."""

import math
from collections.abc import Sequence

from fisher_mask_mergekit.evaluation.bootstrap import Estimate
from fisher_mask_mergekit.pages.canvas import INK, canvas, inline_svg, style
from fisher_mask_mergekit.pages.html import Html
from fisher_mask_mergekit.pages.text import clean

_FIRST, _OTHER = "#7d8794", "#3b78b8"


def score_bars(scores: Sequence[tuple[str, Estimate]], prefix: str, label: str) -> Html:
    """One bar per merge from 0 to its normalised score, with its interval; across it, the first merge's score.

    Args:
        scores: Name and normalised score, from top to bottom.
        prefix: Of the picture's ids.
        label: What someone who cannot see it is told.
    """
    with style(for_page=True):
        figure, axis = canvas(0.9 + 0.5 * len(scores))
        ends = [end for _, one in scores for end in (one.value, one.low, one.high) if math.isfinite(end)]
        first = scores[0][1].value
        right = max(100.0, *ends) if ends else 100.0
        for place, (name, one) in enumerate(scores):
            line = place - 0.42
            axis.text(0, line, clean(name, 26), va="center")
            text = "n/a"
            if math.isfinite(one.value):
                axis.barh(place, one.value, height=0.4, color=_OTHER if place else _FIRST)
                text = f"{one.value:.1f}"
            if math.isfinite(one.low):
                axis.plot(
                    [one.low, one.high], [place, place], color=INK, marker="|", markersize=7, linewidth=1.4
                )
                text += f" [{one.low:.1f}, {one.high:.1f}]"
            if place and math.isfinite(first):
                axis.plot([first, first], [place - 0.25, place + 0.25], color=INK, linestyle=":", linewidth=2)
            axis.text(right, line, text, va="center", ha="right")
        axis.set_xlim(min(0.0, *ends) if ends else 0.0, right * 1.01)
        axis.set_ylim(len(scores) - 0.7, -0.7)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("normalised score (fine-tuned = 100)")
        return inline_svg(figure, prefix, label)
