"""What `clip` is worth: merges from the parent that stay within the range of the parent and the models, beside those that may leave it.

    python benchmarks/clipped.py RECIPE --work FOLDER --parent FOLDER --counts 2,8

merges combinations of the recipe's models by masks, by masks with columns, and by rows and columns of all parameters, with ``prior`` 1 and 3, without
``clip`` and with it. Takes ``--add`` as many.py does. Writes ``clipped.json`` and ``clipped.md`` into the work folder.
"""

from collections.abc import Mapping
from typing import Any

from compare import write
from many import counted, options, pooled, tables
from ways import ALL, AVERAGE, COLUMNS, MASK, clipped, from_parent

FREE = [from_parent(way, prior) for way in (MASK, COLUMNS, ALL) for prior in (1, 3)]
WAYS = (AVERAGE, *(way for free in FREE for way in (free, clipped(free))))


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``clipped.json``."""
    return {f"Clipped, {title}": table for title, table in tables(pooled(record)).items()}


def main() -> None:
    given = options(__doc__).parse_args()
    write(given.work / "clipped", counted(given, WAYS), markdown)


if __name__ == "__main__":
    main()
