"""docs/architectures.md says what the tests of every architecture hold; ``python -m tests.test_architectures_page`` writes it."""

from collections import Counter
from pathlib import Path

from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.table import TABLE
from tests.families import FAMILIES, REMOTE, Fails, Family, Loses, build
from tests.test_architectures import FLOAT32, precision

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- generated: {} -->", "<!-- end: {} -->"


def families() -> list[str]:
    lines = [
        "| architecture | class | mergekit | sites: attention, FFN, experts | heads, key-value heads | rows to nodes | pre-pass | merge |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_row(family) for family in FAMILIES]


def _row(family: Family) -> str:
    model = build(family)
    sites = sites_of(model, {name: tuple(value.shape) for name, value in model.named_parameters()})
    count = Counter("experts" if site.experts else site.kind for site in sites)
    heads = sorted({(site.heads, site.kv_heads) for site in sites if site.heads}, reverse=True)
    cells = [
        family.name,
        f"`{family.cls}`",
        f"`{family.json}`" if family.json else "inferred",
        ", ".join(str(count[kind]) for kind in ("attention", "ffn", "experts")),
        "; ".join(f"{h}, {k}" for h, k in heads) or "none",
        _rows_to_nodes(family, sites),
        f"{precision(family):.0e}{' (float32)' if family.name in FLOAT32 else ''}" if sites else "",
        _merge(family) if sites else "nothing to weigh",
    ]
    return "| " + " | ".join(cells) + " |"


def _rows_to_nodes(family: Family, sites: tuple[Site, ...]) -> str:
    if not sites:
        return ""
    return "heads coupled by a norm" if family.coupled else "exact"


def _merge(family: Family) -> str:
    if isinstance(family.merge, Fails):
        return f"mergekit: `{family.merge.error}: ... {family.merge.message} ...`"
    if isinstance(family.merge, Loses):
        return f"mergekit loses {', '.join(f'`{part}`' for part in family.merge.parts)}"
    return "as by hand, reloads"


def remote() -> list[str]:
    lines = ["| mergekit's file | queries and keys | heads, key-value heads |", "| --- | --- | --- |"]
    return lines + [
        f"| `{row.name}` | {row.layout}{', stored [in, out]' if row.conv1d else ''} | {row.heads[0]}, {row.heads[1]} |"
        for row in REMOTE
    ]


def table() -> list[str]:
    lines = ["| kind | output projection | its inputs |", "| --- | --- | --- |"]
    for row in TABLE:
        parts = [
            f"`{path}`{f' ({layout})' if row.kind == 'attention' else ''}"
            for path, layout in {**row.inputs, **({row.value: "v"} if row.value else {})}.items()
        ]
        lines.append(f"| {row.kind} | `{row.out}` | {', '.join(parts)} |")
    return lines


def with_tables(page: str) -> str:
    for name, lines in {"table": table(), "families": families(), "remote": remote()}.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        page = "\n".join([before + begin, *lines, end + rest.partition(end)[2]])
    return page


def test_the_page_is_what_the_tests_hold() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run: python -m tests.test_architectures_page"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
