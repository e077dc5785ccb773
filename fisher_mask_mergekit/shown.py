"""Text from files that are not trusted, made fit to be shown: no character that hides, reorders or breaks anything."""

import unicodedata

_MARK = "\N{REPLACEMENT CHARACTER}"
# Control, format (zero-width, and such that change the direction), lone surrogates, private, unassigned, separators.
_UNFIT = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def shown(text: str) -> str:
    """The text with a mark in place of every character that is not to be seen.

    A line break stays where an indented line follows, as in messages of several lines. What a file says goes through
    :func:`one_line` before it is put into such a message.
    """
    return "\n  ".join(map(one_line, text.split("\n  ")))


def one_line(text: str) -> str:
    """The same, with no line break: what a file says cannot pass for a line of its own."""
    return "".join(map(_fit, text))


def _fit(character: str) -> str:
    return _MARK if unicodedata.category(character) in _UNFIT else character
