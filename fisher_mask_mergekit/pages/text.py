"""Text on pages: one line of it, no longer than there is room."""

import unicodedata
from itertools import accumulate

from fisher_mask_mergekit.heads import short_names
from fisher_mask_mergekit.shown import shown


def clean(text: str, limit: int = 300) -> str:
    """One line of visible characters; the middle of a very long text is left out.

    Args:
        text: Any text.
        limit: How many columns it may take; wide characters take two.
    """
    # What is cut is not looked at: a name can be megabytes long.
    kept = text if len(text) <= 2 * limit + 2 else text[: limit + 1] + text[-limit - 1 :]
    return _shortened(shown(" ".join(kept.split())), limit)


def _shortened(line: str, limit: int) -> str:
    if sum(map(_width, line)) <= limit:
        return line
    half = (limit - 1) // 2
    return f"{_first(line, limit - 1 - half)}…{_first(line[::-1], half)[::-1]}"


def _first(line: str, limit: int) -> str:
    for end, taken in enumerate(accumulate(map(_width, line))):
        if taken > limit:
            return line[:end]
    return line


def _width(mark: str) -> int:
    return 2 if unicodedata.east_asian_width(mark) in "WF" else 1


def headings(models: list[str]) -> list[str]:
    """A heading for each model, by its name as the user wrote it, no two alike."""
    return apart(short_names(models))


def apart(names: list[str]) -> list[str]:
    """Names fit to be headings: cleaned, short, and numbered where two would look the same."""
    lines = [clean(name, 60) or "(no name)" for name in names]
    return [f"{line} ({place})" if lines.count(line) > 1 else line for place, line in enumerate(lines, 1)]
