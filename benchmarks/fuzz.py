"""Read thousands of damaged and hostile sidecars, recipes and data files: does any crash, hang, or pass for sound?

    python benchmarks/fuzz.py [--sidecars 20000] [--factored 4000] [--partials 2000] [--recipes 2000] [--data 2000] [--guided 20000] [--seed 0]
        [--json FILE]

Each is made of a sound file by hypothesis, read, and used as a merge would use it. ``--guided`` adds mutants that atheris looks for, by
which lines of the package they reach; needs `pip install 'fisher-mask-mergekit[fuzz]'`. Run from a clone of the repository:
the sound files are those of the tests.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from processes import HERE, run_python
from rows import markdown, report
from safetensors.torch import load_file

from fisher_mask_mergekit.blocks import blocks
from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.diagonal_sidecar import read_diagonal
from fisher_mask_mergekit.errors import FisherMaskError
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar, read_factored
from fisher_mask_mergekit.partial_sums import PartialSums
from fisher_mask_mergekit.preview.check import check_recipe
from fisher_mask_mergekit.preview.printout import sidecar_lines
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, read
from fisher_mask_mergekit.sites import row_fisher
from fisher_mask_mergekit.tally import Tally as Progress
from fisher_mask_mergekit.tasks import SequenceClassification
from fisher_mask_mergekit.tuning.written import with_coefficients

__all__ = ["markdown"]

SECONDS = 20
"""How long one file may take."""

SIDECARS = {
    "bits": 4, "cut": 2, "overwritten": 2, "header": 3, "metadata": 3, "tensors": 2, "sealed metadata": 1,
    "sealed tensors": 1, "folder": 1, "sealed folder": 1,
}  # fmt: skip
"""Targets, and how many of the sidecars each one gets of every twenty."""

FACTORED = ("factored", "sealed factored")
PARTIALS = ("partial", "sealed partial")
DATA = ("jsonl", "csv", "parquet")
GUIDED = ("sealed metadata", "sealed factored")
FAILURES = ("crash", "hang", "wrong")


class Hang(BaseException):
    """A file took longer than it may."""


@dataclass(frozen=True)
class Target:
    """A kind of file and what is done to it.

    Attributes:
        file: What is read.
        change: What was done to a sound one.
        original: The sound one.
        mutants: What is read in its place.
        use: Reads one and uses it; says whether it holds what the sound one does.
        may_differ: Whether one that holds something else is sound too: with a checksum of its own, or of a kind without.
    """

    file: str
    change: str
    original: Any
    mutants: SearchStrategy[Any]
    use: Callable[[Any], bool]
    may_differ: bool = False

    def judge(self, mutant: Any) -> tuple[str, str]:
        """What came of a mutant, and of what is wrong the reason."""
        try:
            with _limit():
                same = self.use(mutant)
        except FisherMaskError as error:
            return ("refused", "") if str(error) else ("crash", "an error that says nothing")
        except KeyboardInterrupt:
            raise
        except BaseException:  # Libraries written in Rust panic with something that is no Exception.
            kind = "hang" if isinstance(sys.exception(), Hang) else "crash"
            return kind, traceback.format_exc(limit=-3)
        return ("same" if same else "other" if self.may_differ else "wrong"), ""


@contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def targets(folder: Path) -> dict[str, Target]:
    """All of them, by name.

    Args:
        folder: Where the files go.
    """
    from fisher_mask_mergekit.store import BESIDE
    from tests import tiny
    from tests.test_check import measure, recipe_for
    from tests.test_diagonal_sidecar import made_up, write_for

    one = tiny.checkpoint(folder / "one", num_hidden_layers=1)
    two = tiny.sibling(folder / "two", one, seed=1)
    for number, model in enumerate((one, two)):
        measure(model, number)
    model = tiny.classifier("bert", 2, num_hidden_layers=1)
    diagonals = []
    for number in (0, 1):
        write_for(model, folder / "diagonal", made_up(model, seed=number))
        diagonals.append({file.name: file.read_bytes() for file in (folder / "diagonal").iterdir()})
    content, files = (one / BESIDE).read_bytes(), diagonals[0]
    recipe = recipe_for(folder, (one, two)).read_text()
    rows = tiny.write_data(folder / "data.jsonl", rows=8).read_bytes()
    mask = partial(_use_mask, folder / "mask.safetensors", read(one / BESIDE), model.state_dict())
    diagonal = partial(_use_diagonal, folder / "diagonal", model.state_dict(), made_up(model, seed=0))
    data = partial(_use_data, folder / "mutant")
    table = _as_table(rows, folder)
    mask_target, folder_target = (
        partial(Target, "sidecar", original=content, use=mask),
        partial(Target, "full-size sidecar", original=files, use=diagonal),
    )
    return {
        "bits": mask_target("bits flipped", mutants=mutants.flipped(content)),
        "cut": mask_target("cut, or longer", mutants=mutants.cut(content)),
        "overwritten": mask_target("overwritten", mutants=mutants.overwritten(content)),
        "header": mask_target("header edited", mutants=mutants.header_of(content)),
        "metadata": mask_target("metadata edited", mutants=mutants.metadata_of(content)),
        "tensors": mask_target("tensors exchanged", mutants=mutants.tensors_of(content)),
        "sealed metadata": mask_target(
            "metadata edited, checksum made anew", mutants=mutants.metadata_of(content, sealed=True), may_differ=True
        ),
        "sealed tensors": mask_target(
            "tensors exchanged, checksum made anew", mutants=mutants.tensors_of(content, sealed=True), may_differ=True
        ),
        "folder": folder_target("files damaged, edited, exchanged", mutants=mutants.folder_of(files, diagonals[1])),
        "sealed folder": folder_target(
            "edited, checksums made anew", mutants=mutants.sealed_folder_of(files), may_differ=True
        ),
        **_factored_targets(folder / "experts"),
        **_partial_targets(folder / "sums", read(one / BESIDE)),
        "recipe": Target(
            "recipe", "damaged or edited", recipe.encode(), mutants.recipe_of(recipe),
            partial(_use_recipe, folder / "mutant.yml"), may_differ=True,
        ),
        "jsonl": Target(
            "data, .jsonl", "damaged or edited", rows, mutants.rows_of(rows), partial(data, ".jsonl"), may_differ=True
        ),
        **{
            suffix: Target(
                f"data, .{suffix}", "damaged", made, mutants.bytes_of(made), partial(data, f".{suffix}"), may_differ=True
            )
            for suffix, made in table.items()
        },
    }  # fmt: skip


def _factored_targets(folder: Path) -> dict[str, Target]:
    """Rows and columns, of a checkpoint whose files have pieces of what the model has whole: its experts."""
    from fisher_mask_mergekit.store import FACTORED_BESIDE
    from tests.families import build
    from tests.test_diagonal import family_named
    from tests.test_diagonal_method import measured

    measured(build(family_named("mixtral")), folder, seed=0, kind="factored")
    content = (folder / FACTORED_BESIDE).read_bytes()
    use = partial(
        _use_factored,
        folder / "mutant.safetensors",
        read_factored(folder / FACTORED_BESIDE),
        load_file(folder / "model.safetensors"),
    )
    target = partial(Target, "sidecar of rows and columns", original=content, use=use)
    return _damaged_and_sealed("factored", target, content)


def _damaged_and_sealed(name: str, target: Callable[..., Target], content: bytes) -> dict[str, Target]:
    """All changes of a file with tensors as two targets."""
    edits = (mutants.metadata_of, mutants.tensors_of)
    damaged = [made(content) for made in (mutants.bytes_of, mutants.header_of, *edits)]
    sealed = [made(content, sealed=True) for made in edits]
    return {
        name: target("damaged, edited, exchanged", mutants=st.one_of(damaged)),
        f"sealed {name}": target("edited, checksum made anew", mutants=st.one_of(sealed), may_differ=True),
    }


def _partial_targets(place: Path, sidecar: Sidecar) -> dict[str, Target]:
    """Sums that a measurement goes on from."""
    found = {
        (output, node): vector
        for output, vectors in sidecar.fisher.items()
        for node, vector in vectors.items()
    }
    keys = {".".join(key): key for key in found}
    sums = PartialSums(place, lambda: {"seed": 0, "device": "cpu"}, keys, 8, 1e-9, _refuse_damaged)
    wanted: Progress[Any] = Progress(found, 6, 1.5, 2.0)
    sums.keep(wanted, lambda: None)
    content = sums.path.read_bytes()
    target = partial(Target, "partial sums", original=content, use=partial(_use_partial, sums, wanted))
    return _damaged_and_sealed("partial", target, content)


def _refuse_damaged(note: str) -> None:
    raise FisherMaskError(note)


def _use_partial(sums: PartialSums[Any], wanted: Progress[Any], content: bytes) -> bool:
    sums.path.write_bytes(content)
    got = sums.begin(1 << 30, anew=False)
    assert got is not None
    got.check_shapes({key: tuple(total.shape) for key, total in wanted.sums.items()})
    same = all(torch.equal(got.sums[key], total) for key, total in wanted.sums.items() if key in got.sums)
    return (
        same and replace(got, sums={}) == replace(wanted, sums={}) and got.sums.keys() == wanted.sums.keys()
    )


def _as_table(rows: bytes, folder: Path) -> dict[str, bytes]:
    """The same rows in the other formats."""
    import datasets

    (folder / "rows.jsonl").write_bytes(rows)
    made = datasets.Dataset.from_list([json.loads(line) for line in rows.splitlines()])
    made.to_csv(folder / "rows.csv")
    made.to_parquet(folder / "rows.parquet")
    return {suffix: (folder / f"rows.{suffix}").read_bytes() for suffix in ("csv", "parquet")}


def _use_mask(path: Path, wanted: Sidecar, state: dict[str, torch.Tensor], content: bytes) -> bool:
    path.write_bytes(content)
    got = read(path)
    assert all(line for line in sidecar_lines(got)) or got.means
    for name, tensor in state.items():
        found = got.identify(name, tensor)
        if found is not None and found[1].layout != "mean":
            site, governed = found
            row_fisher(site, governed, got.fisher[site.output], torch.ones(1)).expand(tensor.shape)
    same_values = got.values.keys() == wanted.values.keys() and all(
        torch.equal(got.values[name], wanted.values[name]) for name in wanted.values
    )
    return got.metadata == wanted.metadata and same_values and _same(got, wanted)


def _same(got: Sidecar, wanted: Sidecar) -> bool:
    return all(
        torch.equal(got.fisher[output][node], vector)
        for output, vectors in wanted.fisher.items()
        for node, vector in vectors.items()
    )


def _use_diagonal(
    folder: Path, state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], files: mutants.Files
) -> bool:
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    got = read_diagonal(folder)
    fisher = {}
    for name, tensor in state.items():
        record = got.identify(name, tensor)
        if record is not None:
            fisher[name] = got.fisher(record).expand(tensor.shape)
    return fisher.keys() == wanted.keys() and all(torch.equal(fisher[name], wanted[name]) for name in wanted)


def _use_factored(
    path: Path, wanted: FactoredSidecar, state: dict[str, torch.Tensor], content: bytes
) -> bool:
    path.write_bytes(content)
    got = read_factored(path)
    assert list(sidecar_lines(got))
    fisher, same = _products(got, state), _products(wanted, state)
    return (
        got.metadata == wanted.metadata
        and fisher.keys() == same.keys()
        and all(torch.equal(fisher[name], same[name]) for name in same)
    )


def _products(sidecar: FactoredSidecar, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Fisher information of a checkpoint's tensors, laid out block by block as a merge does it."""
    made = {}
    for name, tensor in state.items():
        record = sidecar.identify(name, tensor)
        if record is not None:
            assert sidecar.mean_of(record) >= 0
            whole = torch.empty(tensor.shape, dtype=torch.float64)
            for index in blocks(tensor.shape, 100):
                whole[index] = sidecar.fisher(record, index)
            assert bool((whole.isfinite() & (whole >= 0)).all())
            made[name] = whole
    return made


def _use_recipe(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    recipe = read_recipe(path)
    with_coefficients(recipe, None)
    for finding in check_recipe(path):
        if finding.level == "error":
            raise FisherMaskError(finding.detail)
    return False


def _use_data(path: Path, suffix: str, content: bytes) -> bool:
    path = path.with_suffix(suffix)
    path.write_bytes(content)
    load_samples(FisherSettings(data=str(path)), SequenceClassification(label2id={"0": 0, "1": 1}))
    return False


@dataclass
class Tally:
    """What came of a target's mutants.

    Attributes:
        target: Which.
        counts: How many came to what.
        reasons: Of the first that came to something wrong.
    """

    target: Target
    counts: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    def add(self, mutant: Any) -> None:
        """Judge one."""
        verdict, reason = self.target.judge(mutant)
        self.counts[verdict] += 1
        if verdict in FAILURES and len(self.reasons) < 5:
            self.reasons.append(f"{verdict}: {reason or mutant!r:.2000}")

    def test(self, count: int, number: int) -> Any:
        """A test by hypothesis that judges that many."""

        @seed(number)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(self.target.mutants)
        def judge(mutant: Any) -> None:
            assume(mutant != self.target.original)
            self.add(mutant)

        return judge

    def row(self) -> dict[str, Any]:
        """As a line of the table."""
        counts = self.counts
        return {
            "file": self.target.file,
            "change": self.target.change,
            "mutants": counts.total(),
            "refused": counts["refused"],
            "read, the same": counts["same"],
            "read, sound": counts["other"],
            **{
                name: counts[kind] for name, kind in zip(("crashes", "hangs", "wrong"), FAILURES, strict=True)
            },
        }


def judged(counts: dict[str, int], number: int) -> dict[str, Any]:
    """Judge as many mutants of each target as there are to be, by name."""
    with tempfile.TemporaryDirectory() as folder:
        known = targets(Path(folder))
        tallies = [Tally(known[name]) for name in counts]
        for tally, count in zip(tallies, counts.values(), strict=True):
            tally.test(count, number)()
    return {
        "rows": [tally.row() for tally in tallies],
        "reasons": [why for one in tallies for why in one.reasons],
    }


def shares(given: argparse.Namespace) -> dict[str, int]:
    """How many mutants each target gets."""
    found = {name: -(-given.sidecars * weight // sum(SIDECARS.values())) for name, weight in SIDECARS.items()}
    for count, names in (
        (given.factored, FACTORED),
        (given.partials, PARTIALS),
        (given.recipes, ("recipe",)),
        (given.data, DATA),
    ):
        found |= dict.fromkeys(names, -(-count // len(names)))
    return {name: count for name, count in found.items() if count}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in {
        "sidecars": 20_000,
        "factored": 4000,
        "partials": 2000,
        "recipes": 2000,
        "data": 2000,
        "guided": 0,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{option}", type=int, default=default, help="[default: %(default)s]")
    parser.add_argument(
        "--json", type=Path, default=HERE / "results" / "fuzz.json", help="[default: %(default)s]"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sys.path.insert(0, str(HERE.parent))
        print(json.dumps(judged(given.child, given.seed)))
        return
    # In processes of their own, offline and with a cache that goes: whatever ends one of them ends the run.
    scripts = [["fuzz.py", "--child", json.dumps(shares(given)), "--seed", str(given.seed)]]
    if given.guided:
        scripts += [["fuzz_guided.py", str(given.guided), name] for name in GUIDED]
    found = [_run(HERE / name, arguments) for name, *arguments in scripts]
    rows = [row for one in found for row in one["rows"]]
    report({"rows": rows, "seconds": SECONDS, "seed": given.seed}, "Mutants", given.json)
    if reasons := [reason for one in found for reason in one["reasons"]]:
        raise SystemExit("\n\n".join(reasons))


def _run(script: Path, arguments: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as cache:
        places = {"HF_HOME": cache, "FISHER_MASK_CACHE": cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        return json.loads(run_python([str(script), *arguments], **places).last_line)


if __name__ == "__main__":
    main()
