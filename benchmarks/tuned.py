"""What a search for coefficients adds: every pair of a recipe's checkpoints, merged as it is and as ``mergekit-fisher tune`` has it.

    python benchmarks/tuned.py RECIPE --work FOLDER --parent FOLDER

Trials are scored on training rows that were not measured on, so that the rows of the tables have chosen nothing. Writes
``tuned.json`` and ``tuned.md`` into the work folder, and keeps there every recipe that was found, with its trials.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import summary
import yaml
from compare import Bench, arguments, bench, compare, entries, groups_of, recipe_of, results_key, same, write
from ways import ALL, AVERAGE, MASK, Way, from_parent

from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.evaluation.plan import Merge, Options, Subject
from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.tuning.tune import claimed, prepare, run

UNTUNED = (AVERAGE, from_parent(MASK, 1), from_parent(ALL, 1))


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

    def __call__(self, group: Sequence[Subject], first: Merge) -> Merge:
        """The best trial's merge."""
        recipe = self._recipe(group)
        out = recipe.with_name("tuned.yml")
        with claimed(out):
            read = read_recipe(recipe, {"dtype": group[0].settings.dtype})
            tuning = prepare(read, out, self.rows, Options(), self.setting.device)
            for note in tuning.notes:
                print(note, file=sys.stderr)
            run(tuning, self.trials, lambda study: None)
        encoder, config = merge_in_memory(read_recipe(out).document, self.tuned.name)
        return Merge(self.tuned.name, encoder, config=config)

    @property
    def tuned(self) -> Way:
        """What tables call the best trial."""
        return replace(self.way, name=f"{self.way.name}, tuned")

    def key(self, group: Sequence[Subject]) -> list[Any]:
        """The search, and the rows that were measured on and are held back."""
        drawn = [
            one.model.request.model_copy(update={"samples": one.model.request.samples + self.rows})
            for one in group
        ]
        digests = [
            load_samples(request, one.task).record.digest for request, one in zip(drawn, group, strict=True)
        ]
        return [self.trials, self.rows, str(self.setting.device), version("optuna"), digests]

    def _recipe(self, group: Sequence[Subject]) -> Path:
        """The recipe of the way as it is, on disk, in a folder of its own."""
        document = recipe_of(self.setting, group, self.way)
        for entry in entries(document):
            for one in group:
                if same(one.model.name, entry["model"]):
                    measured = self.way.settings(one.model.request, one.config.num_labels)
                    scored = {
                        "eval": one.settings.data,
                        "metric": [metric.name for metric in one.metrics],
                    }
                    entry["fisher"] = measured.model_dump(exclude_none=True) | scored
        key = results_key(self.setting, group, [self.way, self.tuned], {self.tuned.name: self})
        path = self.setting.work / "tuned" / key[:12] / "recipe.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, yaml.safe_dump(document).encode())
        return path


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title, of what was written to ``tuned.json``."""
    found, trials, held = record["records"], record["trials"], record["held_back"]
    pairs = f"{len(found)} pair{'s' * (len(found) != 1)}"
    return {
        f"Tuned by {trials} trials on {held} rows of each model's training data, {pairs}": aligned(
            summary.rows(summary.summaries(found))
        ),
        f"Tuned minus as it is, mean normalised score of {pairs}": aligned(_gains(found)),
    }


def _gains(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["merge", "mean", "tuned", "gain", "least", "greatest", "above"]]
    results = [one["results"] for one in found]
    for name in results[0]["merges"][::2]:
        as_it_is, tuned = (
            numpy.array(
                [[task["normalised"][line]["value"] for task in one["tasks"]] for one in results], float
            )
            for line in (name, f"{name}, tuned")
        )
        gains = (tuned - as_it_is).mean(1)
        numbers = [f"{as_it_is.mean():.1f}", f"{tuned.mean():.1f}"]
        numbers += [f"{gain:+.1f}" for gain in (gains.mean(), gains.min(), gains.max())]
        table.append([name, *numbers, f"{(gains > 0).sum()} of {len(gains)}"])
    return table


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
    if given.pooler != "own":
        parser.error("tuned merges are compared with --pooler own only")
    setting = bench(given)
    tuners = [Tuner(setting, way, given.trials, given.held_back) for way in UNTUNED]
    ways = [way for one in tuners for way in (one.way, one.tuned)]
    found = compare(
        setting, groups_of(setting.subjects, 2, given.pairs), ways, {one.tuned.name: one for one in tuners}
    )
    record = {**setting.facts(), "trials": given.trials, "held_back": given.held_back, "records": found}
    write(given.work / "tuned", record, markdown)


if __name__ == "__main__":
    main()
