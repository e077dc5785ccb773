"""The tables in the pages against what the benchmarks wrote. `python -m tests.test_figures` writes them anew."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import BENCHMARKS, benchmark

ROOT = Path(__file__).parent.parent
RESULTS = BENCHMARKS / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- figures: (\w+)(?:, ([^>]+?))? -->\n.*?<!-- end of figures -->", flags=re.DOTALL)


def script_of(file: Path) -> str:
    """Which script wrote it: several runs of one have a dash and more behind its name."""
    return file.stem.partition("-")[0]


def tables(name: str) -> dict[str, str]:
    """By title, what a benchmark's script makes of its JSON, of all its runs."""
    made: dict[str, str] = {}
    for file in sorted(RESULTS.glob("*.json")):
        if script_of(file) == name:
            more = benchmark(name).markdown(json.loads(file.read_text()))
            assert not made.keys() & more.keys(), f"{file.name} has titles that another run has"
            made |= more
    return made


def with_figures(page: str) -> str:
    """The page with the tables that it marks: all of a benchmark's, or those whose title begins as the mark says."""

    def block(match: re.Match[str]) -> str:
        name, start = match[1], match[2] or ""
        found = {title: table for title, table in tables(name).items() if title.startswith(start)}
        assert found, f"{name} has no table '{start}'"
        shown = "\n\n".join(f"{title}:\n\n{table}" for title, table in found.items())
        mark = f"{name}, {start}" if start else name
        return f"<!-- figures: {mark} -->\n{shown}\n<!-- end of figures -->"

    return BLOCK.sub(block, page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_are_the_benchmarks(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- figures:") == len(BLOCK.findall(text))
    assert with_figures(text) == text, "run: python -m tests.test_figures"


def test_every_result_is_shown_somewhere() -> None:
    shown = {match[1] for page in PAGES for match in BLOCK.finditer(page.read_text())}
    assert shown == {script_of(file) for file in RESULTS.glob("*.json")} != set()


if __name__ == "__main__":
    for one in PAGES:
        one.write_text(with_figures(one.read_text()))
