"""The pieces of a page. Text never becomes markup: every string that is not :class:`Html` is escaped."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import numpy

from fisher_mask_mergekit import __version__
from fisher_mask_mergekit.pages.text import clean

MOST_CELLS = 200_000
"""Of a table; with more, browsers become slow."""

# Nothing is loaded from anywhere and nothing runs, whatever a sidecar or a recipe says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Html(str):
    """Markup."""


def element(name: str, *children: str, **attributes: str | int) -> Html:
    """An element; of its children, plain strings are text.

    Args:
        name: The tag.
        children: From first to last.
        attributes: Their names with underscores for hyphens; one at the end, as in ``class_``, is dropped.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(clean(str(value), 1000))}"'
        for key, value in attributes.items()
    )
    inner = "".join(child if isinstance(child, Html) else escape(clean(child, 2000)) for child in children)
    return Html(f"<{name}{given}>{inner}</{name}>")


def joined(parts: Iterable[Html]) -> Html:
    """Several pieces, one after the other."""
    return Html("\n".join(parts))


def sentence(*parts: str) -> Html:
    """Running text of any length, in which every second part is a name from a file, set apart from the text around it."""
    return Html(
        "".join(element("bdi", part) if place % 2 else escape(part) for place, part in enumerate(parts))
    )


def number(value: Any, form: str = ".3e") -> Html:
    """A number as people read it, with all of its digits for programs.

    Args:
        value: A Python or NumPy number; its own precision is kept.
        form: How people read it.
    """
    if not math.isfinite(value):
        return Html("n/a")
    if isinstance(value, int | numpy.integer):
        return element("data", str(value), value=str(value))
    exact = str(value) if isinstance(value, numpy.floating) else repr(float(value))
    return element("data", "0" if value == 0 and "e" in form else f"{value:{form}}", value=exact)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table that scrolls sideways by itself, with the keyboard too. A row's first cell is its name."""
    if len(head) * len(rows) > MOST_CELLS:
        return element("p", f"{caption}: too large for a page, {len(rows)} rows of {len(head)} cells.")
    top = element("tr", *(element("th", _name(cell, 120), scope="col") for cell in head))
    body = [
        element(
            "tr",
            element("th", _name(cells[0], 300), scope="row"),
            *(element("td", cell) for cell in cells[1:]),
        )
        for cells in rows
    ]
    inner = element("caption", caption), element("thead", top), element("tbody", joined(body))
    return element(
        "div",
        element("table", *inner),
        class_="scroll",
        role="region",
        tabindex=0,
        aria_label=f"Table: {caption}",
    )


def _name(text: str, limit: int) -> Html:
    return element("span", text if isinstance(text, Html) else clean(text, limit))


def figure(title: str, picture: Html, caption: Html, numbers: Html, about: str) -> Html:
    """A picture, what it shows, and the numbers behind it, folded.

    Args:
        title: Its heading.
        picture: An ``svg`` with a label of its own.
        caption: In words.
        numbers: Tables.
        about: What the numbers are, so that several such figures can be told apart by ear.
    """
    folded = element("details", element("summary", f"Numbers: {about}"), numbers)
    return element("figure", element("h3", title), picture, element("figcaption", caption), folded)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: Its id.
        heading: Its name.
        body: What is in it.
        kind: ``model`` if it is a model's panel.
    """

    anchor: str
    heading: str
    body: Html
    kind: str = "part"

    def html(self) -> Html:
        """The section as it stands on the page."""
        heading = element("h2", self.heading, id=f"{self.anchor}-heading")
        return element(
            "section",
            heading,
            self.body,
            id=self.anchor,
            class_=self.kind,
            aria_labelledby=f"{self.anchor}-heading",
        )


def page(title: str, lead: Html, sections: Sequence[Section]) -> str:
    """A whole page, which needs nothing but itself.

    Args:
        title: Its heading.
        lead: What it is about.
        sections: From top to bottom.
    """
    style = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
    links = [element("li", element("a", one.heading, href=f"#{one.anchor}")) for one in sections]
    body = [
        element("a", "Skip to the content", class_="skip", href="#content"),
        element("header", element("h1", title), element("p", lead)),
        element("nav", element("ul", joined(links)), aria_label="Contents"),
        element("main", joined(one.html() for one in sections), id="content", tabindex=-1),
        element("footer", element("p", f"Made by fisher-mask-mergekit {__version__}.")),
    ]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',  # Else a browser asks the server for one.
            element("title", title),
            f"<style>\n{style}</style>",
            "</head>",
            f"<body>\n{joined(body)}\n</body>",
            "</html>\n",
        )
    )
