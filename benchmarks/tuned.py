"""What a search for coefficients adds: every pair of a recipe's checkpoints, merged as it is and as ``mergekit-fisher tune`` has it.

    python benchmarks/tuned.py RECIPE --work FOLDER --parent FOLDER

Trials are scored on training rows that were not measured on, so that the rows of the table have chosen nothing. Writes
``tuned.json`` and ``tuned.md`` into the work folder, and keeps there every recipe that was found, with its trials.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import summary
import yaml
from compare import Bench, arguments, bench, compare, entries, recipe_of, same, write
from ways import AVERAGE, Way, factored, from_parent, mask

from fisher_mask_mergekit.cli.options import scoring_overrides
from fisher_mask_mergekit.evaluation.plan import Merge, Options, Subject
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.tuning.tune import claimed, prepare, run

UNTUNED = (AVERAGE, from_parent(mask("masks"), 1), from_parent(factored("all"), 1))


@dataclass(frozen=True)
class Tuner:
    """Merges groups of models in one way, with the coefficients that are best on rows held back of their training data.

    Attributes:
        setting: What and where.
        way: As it is untuned.
        trials: How many merges to try.
        rows: How many rows to hold back of each model's data.
    """

    setting: Bench
    way: Way
    trials: int
    rows: int

    def __call__(self, group: Sequence[Subject], average: Merge) -> Merge:
        """The best trial's merge."""
        recipe = self._recipe(group)
        out = recipe.with_name("tuned.yml")
        read = read_recipe(recipe, scoring_overrides("accuracy", group[0].settings.dtype))
        with claimed(out):
            tuning = prepare(read, out, self.rows, Options(), self.setting.device)
            run(tuning, self.trials, lambda study: None)
        encoder, config = merge_in_memory(read_recipe(out).document, self.tuned.name)
        return Merge(self.tuned.name, encoder, config=config)

    @property
    def tuned(self) -> Way:
        """What tables call the best trial, and all that it hangs on."""
        more = {"trials": self.trials, "held_back": self.rows}
        return replace(self.way, name=f"{self.way.name}, tuned", parameters={**self.way.parameters, **more})

    def _recipe(self, group: Sequence[Subject]) -> Path:
        """The recipe of the way as it is, on disk, in a folder of its own."""
        document = recipe_of(self.setting, group, self.way)
        for entry in entries(document):
            for one in group:
                if same(one.model.name, entry["model"]):
                    settings = self.way.settings(one.model.request, one.config.num_labels)
                    entry["fisher"] = settings.model_dump(exclude_none=True) | {"eval": one.settings.data}
        text = yaml.safe_dump(document)
        key = hashlib.sha256(f"{self.trials} {self.rows} {text}".encode()).hexdigest()[:12]
        path = self.setting.work / "tuned" / key / "recipe.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
        return path


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The table, by title, of what was written to ``tuned.json``."""
    found, trials, held = record["records"], record["trials"], record["held_back"]
    pairs = f"{len(found)} pair{'s' * (len(found) != 1)}"
    title = f"Tuned by {trials} trials on {held} rows of each model's training data, {pairs}"
    return {title: aligned(summary.rows(summary.summaries(found)))}


def at_least_one(text: str) -> int:
    """A number of things that cannot be none."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--trials", type=at_least_one, default=20, help="merges to try of each [default: %(default)s]"
    )
    parser.add_argument(
        "--held-back",
        type=at_least_one,
        default=128,
        help="rows of each model's training data to try them on [default: %(default)s]",
    )
    parser.add_argument("--pairs", type=at_least_one, help="pairs to draw [default: all]")
    given = parser.parse_args()
    setting = bench(given)
    pairs = list(combinations(setting.subjects, 2))
    pairs = Random(0).sample(pairs, min(given.pairs or len(pairs), len(pairs)))
    tuners = [Tuner(setting, way, given.trials, given.held_back) for way in UNTUNED]
    ways = [way for one in tuners for way in (one.way, one.tuned)]
    found = compare(setting, pairs, ways, {one.tuned.name: one for one in tuners})
    record = {**setting.facts(), "trials": given.trials, "held_back": given.held_back, "records": found}
    write(given.work / "tuned", record, markdown)


if __name__ == "__main__":
    main()
