"""What `mergekit-fisher check` finds, as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        level: ``error``: the merge fails, or is not what was asked for; ``warning``: it may not be.
        what: What it is about: ``recipe``, ``checkpoint``, ``architecture``, ``heads``, ``vocabulary``,
            ``shapes``, ``loss``, ``weight``, ``sidecar``, ``measurement``, ``dtype``, ``base model``, ``data``, ``adapter``.
        detail: What was found, where.
        remedy: What to do or run.
    """

    level: Literal["error", "warning"]
    what: str
    detail: str
    remedy: str


def listed(items: Sequence[str], limit: int) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
