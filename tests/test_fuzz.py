"""A short run of `benchmarks/fuzz.py`: nothing that is damaged or hostile crashes a reader, or passes for sound."""

import json
from pathlib import Path

import pytest

from fisher_mask_mergekit.errors import SidecarError
from tests.benchmarks import benchmark

pytestmark = pytest.mark.xdist_group("fuzz")  # What they share is made once.
fuzz = benchmark("fuzz")
SEALED = (*fuzz.SIDECARS, *fuzz.FACTORED, *fuzz.PARTIALS)
FEW = {"folder": 20, "sealed folder": 20, "recipe": 8, "jsonl": 5, "csv": 3, "parquet": 5}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    made: dict[str, object] = fuzz.targets(tmp_path_factory.mktemp("fuzz"))
    return made


@pytest.mark.parametrize("name", [*SEALED, "recipe", *fuzz.DATA])
def test_no_mutant_crashes_hangs_or_passes_for_sound(targets: dict[str, object], name: str) -> None:
    tally = fuzz.Tally(targets[name])
    tally.test(FEW.get(name, 40), 0)()
    assert tally.counts.total() == FEW.get(name, 40)
    assert not tally.reasons


def test_the_sound_ones_are_read_and_used(targets: dict[str, object]) -> None:
    for name, target in targets.items():
        verdict, reason = target.judge(target.original)  # type: ignore[attr-defined]
        assert (verdict, reason) == ("same" if name in SEALED else "other", "")


def test_what_goes_wrong_is_counted(targets: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def run(use: object) -> dict[str, object]:
        tally = fuzz.Tally(replace(targets["bits"], use=use))  # type: ignore[type-var]
        tally.test(3, 0)()
        row: dict[str, object] = tally.row()
        return {name: count for name, count in row.items() if isinstance(count, int) and count}

    def loop(content: bytes) -> bool:
        while True:
            pass

    def panic(content: bytes) -> bool:
        raise BaseException("thread panicked")

    def refuse(content: bytes) -> bool:
        raise SidecarError("no")

    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    assert run(loop) == {"mutants": 3, "hangs": 3}
    assert run(panic) == {"mutants": 3, "crashes": 3}
    assert run(lambda content: False) == {"mutants": 3, "wrong": 3}
    assert run(lambda content: True) == {"mutants": 3, "read, the same": 3}
    assert run(refuse) == {"mutants": 3, "refused": 3}


def test_the_shares_are_what_was_asked_for(tmp_path: Path) -> None:
    from argparse import Namespace

    shares = fuzz.shares(Namespace(sidecars=20_000, factored=4000, partials=2000, recipes=0, data=2000))
    assert sum(shares[name] for name in fuzz.SIDECARS) >= 20_000
    assert sum(shares[name] for name in fuzz.FACTORED) == 4000
    assert sum(shares[name] for name in fuzz.PARTIALS) == 2000
    assert "recipe" not in shares
    assert sum(shares[name] for name in fuzz.DATA) >= 2000
    fuzz.report({"rows": [{"file": "x", "mutants": 12_345}]}, "Title", tmp_path / "out.json")
    assert list(fuzz.markdown(json.loads((tmp_path / "out.json").read_text()))) == ["Title"]
    assert "12,345" in fuzz.markdown(json.loads((tmp_path / "out.json").read_text()))["Title"]
