"""What of a merge from the parent is the Fisher information's: the same with equal values everywhere, measured on nothing.

    python benchmarks/equal.py RECIPE --work FOLDER --parent FOLDER

merges every pair of the recipe's models by masks, by masks with columns, and by rows and columns of all parameters, from the parent and
clipped, beside merges that know no Fisher information: ``task_arithmetic`` with more and more of every change, and ``fisher_mask``
without sidecars (``missing: average``), clipped, which with ``prior`` 1 takes two thirds of every change, and with a large one all.
Takes ``--add`` as many.py does. Writes ``equal.json`` and ``equal.md`` into the work folder.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import summary
from compare import add_runs_option, arguments, bench, compare, with_runs, write
from ways import ALL, AVERAGE, COLUMNS, MASK, Way, arithmetic, clipped, from_parent

from fisher_mask_mergekit.evaluation.table import aligned

ALL_CHANGES = 1e6
"""A ``prior`` beside which the mean of the Fisher information, 1, is nothing."""


def equal(name: str, prior: float) -> Way:
    """Clipped from the parent, every element alike."""
    parameters = {"missing": "average", "normalize": "tensor", "prior": prior, "clip": True}
    return Way(f"equal, {name}, clip", "fisher_mask", parameters, with_parent=True)


WAYS = (
    AVERAGE,
    *map(arithmetic, (0.7, 0.8, 1.0)),
    equal("prior 1", 1),
    equal("all changes", ALL_CHANGES),
    *(clipped(from_parent(way, 1)) for way in (MASK, COLUMNS, ALL)),
    from_parent(ALL, 1),
)


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The table, by title, of what was written to ``equal.json``."""
    found = [one for run in record["runs"] for one in run["records"]]
    return {f"Equal values, {len(found)} pairs": aligned(summary.rows(summary.summaries(found)))}


def main() -> None:
    parser = arguments(__doc__)
    add_runs_option(parser)
    given = parser.parse_args()
    setting = bench(given)
    found = compare(setting, list(combinations(setting.subjects, 2)), WAYS)
    write(given.work / "equal", with_runs(given, {**setting.facts(), "records": found}), markdown)


if __name__ == "__main__":
    main()
