"""Pages as files: what is in them, from any sidecar and recipe; `test_pages_in_browser` opens them."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from typer.testing import CliRunner

from fisher_mask_mergekit import store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.evaluation.bootstrap import Resampled
from fisher_mask_mergekit.evaluation.metrics import METRICS
from fisher_mask_mergekit.evaluation.scores import OWN, Results, TaskScores
from fisher_mask_mergekit.evaluation.table import markdown
from fisher_mask_mergekit.pages.evaluate_page import evaluation_page
from fisher_mask_mergekit.pages.html import Html, element, number, table
from fisher_mask_mergekit.pages.inspect_page import recipe_page, sidecars_page
from fisher_mask_mergekit.pages.text import apart, clean
from fisher_mask_mergekit.preview.inspection import ShareStatistics
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from fisher_mask_mergekit.sites import Node, Site
from tests import tiny
from tests.families import FAMILIES, build
from tests.test_architectures import write_checkpoint
from tests.test_check import recipe_for
from tests.test_registration import loaded
from tests.test_sidecar import sidecar_for

HOSTILE = (
    "<script>alert(1)<\\/script>", '"><img src=x onerror=alert(1)>', "$\\frac$ $x$ #010203", "two\nlines\x00\x1b[31m",
    "\u202eevil\u200b שלום 漢字", "n" * 5000, "\u2028", "&amp;&lt;b&gt;", "\ud800", " ",
)  # fmt: skip
VOID = ("meta", "link")


class Page(HTMLParser):
    """What a page has: its elements, in order, with their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attrs}, texts))
        if tag not in VOID:
            self.open.append((tag, texts))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, texts in self.open:
            texts.append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    def numbers(self) -> dict[str, list[list[str]]]:
        """Each table's caption, and the exact values of each row below its head."""
        found: dict[str, list[list[str]]] = {}
        rows: list[list[str]] = []
        for tag, attributes, texts in self.elements:
            if tag == "caption":
                rows = found["".join(texts)] = []
            elif tag == "tr":
                rows.append([])
            elif tag == "data":
                rows[-1].append(attributes["value"])
        return {caption: rows[1:] for caption, rows in found.items()}


def is_sound(text: str) -> Page:
    """What every page must be: whole, without anything that runs or loads, without an id twice."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "img", "iframe", "object", "b", "foreignobject")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src"):
            target = attributes.get(name, "#content")
            assert target.startswith("data:") or target[1:] in ids, target
        for found in re.findall(
            r"url\(#?([^)]*)\)", " ".join(v for k, v in attributes.items() if not k.startswith("aria"))
        ):
            assert found in ids
    assert "http" not in text.replace("http-equiv", "").split("<body>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert text.isprintable() or not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e]", text
    )
    assert [len(page.all(tag)) for tag in ("h1", "main", "title", "html")] == [1] * 4
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for attributes, _ in page.all("svg"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]
    assert all(attributes["scope"] in ("row", "col") for attributes, _ in page.all("th"))
    return page


def panels(page: Page) -> int:
    return sum(attributes.get("class") == "model" for attributes, _ in page.all("section"))


def inspect(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_page_has_the_sidecars_numbers(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = inspect(*pair, "--html", tmp_path / "report.html", "--png", tmp_path / "map.png", "--json")
    assert len(json.loads(text)["sidecars"]) == 2
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    page = is_sound((tmp_path / "report.html").read_text())
    assert panels(page) == 2
    tables = list(page.numbers().values())
    assert len(tables) == 4
    for place, folder in enumerate(pair):
        sidecar = read(folder / store.BESIDE)
        heads, neurons = tables[2 * place], tables[2 * place + 1]
        sites = sidecar.metadata.sites
        kept = [sidecar.fisher[site.output]["head_fisher"] for site in sites if site.kind == "attention"]
        assert [[numpy.float32(value) for value in row] for row in heads] == [row.tolist() for row in kept]
        layers = [
            sidecar.fisher[site.output]["neuron_fisher"].double() for site in sites if site.kind == "ffn"
        ]
        for row, vector in zip(neurons, layers, strict=True):
            levels = torch.quantile(
                vector, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
            ).tolist()
            assert [float(value) for value in row] == pytest.approx(
                [48, 0, float(vector.mean()), *levels], rel=1e-12
            )
    provenance = [text for _, text in page.all("dd")]
    for line in inspect(pair[0]).splitlines()[:10]:
        assert any(line.strip().endswith(entry) for entry in provenance), line


def test_the_page_of_a_recipe_has_its_shares(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, pair, parameters={"nodes": "columns", "values": True})
    plain = inspect(recipe)
    assert inspect(recipe, "--html", tmp_path / "report.html") == plain
    page = is_sound((tmp_path / "report.html").read_text())
    assert panels(page) == 2
    shares = {caption: rows for caption, rows in page.numbers().items() if "share" in caption}
    groups = json.loads(inspect(recipe, "--json"))["shares"]
    for layout, what in (
        ("q", "query rows"), ("k", "key rows"), ("n", "neurons"), ("v", "value rows"),
        ("columns h", "head columns"), ("columns n", "neuron columns"),
    ):  # fmt: skip
        (rows,) = (rows for caption, rows in shares.items() if what in caption)
        wanted = [
            [value for model in group["models"].values() for value in model.values()]
            for group in groups if group["layout"] == layout
        ]  # fmt: skip
        assert [[float(value) for value in row] for row in rows] == wanted
    assert shares["Each model's share of what weight alone decides on"] == [["0.5", "0.5"]]


def test_a_model_without_a_sidecar_has_a_panel_that_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / store.BESIDE).unlink()
    recipe = recipe_for(tmp_path, pair, parameters={"missing": "average"})
    inspect(recipe, "--html", tmp_path / "report.html")
    page = is_sound((tmp_path / "report.html").read_text())
    assert panels(page) == 2
    assert "No Fisher information to show: it has no sidecar" in page.all("body")[0][1]


@pytest.mark.parametrize("family", ["mixtral", "t5-v1.0", "gemma3-vl", "gpt2"])
def test_every_kind_of_model_has_a_page(family: str, tmp_path: Path) -> None:
    (found,) = (one for one in FAMILIES if one.name == family)
    write_checkpoint(build(found), tmp_path, seed=0)
    sidecar = read(tmp_path / store.BESIDE)
    if family == "mixtral":
        sidecar.fisher["model.layers.1.mlp.experts.down_proj"]["neuron_fisher"][[0, 3]] = 0
    page = is_sound(sidecars_page([sidecar]))
    tables = page.numbers()
    attention = [site for site in sidecar.metadata.sites if site.kind == "attention"]
    grouped = [site for site in attention if site.heads != site.kv_heads]
    nodes: tuple[tuple[str, Node, list[Site]], ...] = (
        ("heads", "head_fisher", attention), ("key-value heads", "kv_head_fisher", grouped),
    )  # fmt: skip
    for what, node, sites in nodes:
        kept = [sidecar.fisher[site.output][node].tolist() for site in sites]
        shown = [row for caption, rows in tables.items() if f"of {what} of" in caption for row in rows]
        assert sorted([float(numpy.float32(v)) for v in row] for row in shown) == sorted(kept)
    if family == "mixtral":
        (experts,) = (rows for caption, rows in tables.items() if "experts of" in caption)
        assert [value == "0.0" for value in experts[1]] == [True, False, False, True]
        assert "Grey is exactly 0: 2 of 8." in page.all("body")[0][1]
        assert any("key-value heads" in caption for caption in tables)


@pytest.mark.parametrize("value", [5e-324, 1e-45, 1e300])
def test_the_smallest_and_the_largest_numbers_are_drawn(value: float) -> None:
    made = sidecar_for(tiny.classifier("bert"))
    fisher = {
        output: {
            node: torch.full_like(vector, value, dtype=torch.float64) for node, vector in vectors.items()
        }
        for output, vectors in made.fisher.items()
    }
    page = is_sound(sidecars_page([Sidecar(made.metadata, fisher, made.values)]))
    assert repr(value) in [attributes["value"] for attributes, _ in page.all("data")]


def test_all_zero_is_drawn_too() -> None:
    made = sidecar_for(tiny.classifier("bert"))
    for vectors in made.fisher.values():
        for vector in vectors.values():
            vector.zero_()
    page = is_sound(sidecars_page([made]))
    assert "all 0" in page.all("svg")[1][0]["aria-label"]


def hostile_sidecar(name: str, seed: int = 0) -> Sidecar:
    made = sidecar_for(tiny.classifier("bert"), seed=seed)
    changes = {
        "checkpoint": name,
        "architecture": name,
        "task": name,
        "device": name,
        "versions": {name: name},
    }
    return Sidecar(made.metadata.model_copy(update=changes), made.fisher, made.values, name)


def test_hostile_names_are_text() -> None:
    page = is_sound(sidecars_page([hostile_sidecar(name) for name in HOSTILE]))
    assert panels(page) == len(HOSTILE)
    headings = [text for _, text in page.all("h2")]
    assert len(set(headings)) == len(headings)
    # What is drawn only looks like the colour that stands for the page's own.
    assert any("#010203" in heading for heading in headings)


def test_hostile_recipes_are_text() -> None:
    shares = [
        ShareStatistics((f"{name}.0.w",), "a.0.o", "q", dict.fromkeys(HOSTILE, (0.5, 0.25, 0.75)))
        for name in HOSTILE[:3]
    ] + [ShareStatistics(HOSTILE, "", "", dict.fromkeys(HOSTILE, (0.1, 0.1, 0.1)))]
    is_sound(recipe_page(HOSTILE[0], dict.fromkeys(HOSTILE), shares))


def test_the_layers_names_are_text_too(tmp_path: Path) -> None:
    """As read from a file, where a site's output may be any text."""
    made = sidecar_for(tiny.classifier("bert"))
    first, *others = made.metadata.sites
    name = "$\\frac$<b>.#010203.url(#x)"
    sites = (first.model_copy(update={"output": name}), *others)
    fisher = {site.output: vectors for site, vectors in zip(sites, made.fisher.values(), strict=True)}
    write(Sidecar(made.metadata.model_copy(update={"sites": sites}), fisher, made.values), tmp_path / "s")
    page = is_sound(sidecars_page([read(tmp_path / "s")]))
    assert any(name == text for _, text in page.all("text"))


def made_results(merges: int = 3, tasks: int = 2, name: str = "") -> Results:
    generator = numpy.random.default_rng(0)
    lines = [OWN, *(f"{name}merge{place}" for place in range(merges))]
    metric = next(one for one in METRICS if one.name == "accuracy")

    def drawn() -> Resampled:
        value = float(generator.uniform(0.5, 0.9))
        return Resampled(value, generator.normal(value, 0.02, 1000))

    scores = [
        TaskScores(f"{name}task{place}", "model", f"{name}data", 99, (metric,),
                   {line: {"accuracy": drawn()} for line in lines})
        for place in range(tasks)
    ]  # fmt: skip
    return Results(scores, lines[1:])


def test_the_page_of_an_evaluation_has_its_scores(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / store.BESIDE).write_text("broken")
    recipe = read_recipe(recipe_for(tmp_path, pair, merge_method="linear"))
    results = made_results()
    page = is_sound(evaluation_page(recipe, results))
    cells = [text for tag in ("th", "td", "caption") for _, text in page.all(tag)]
    for row in markdown(results).splitlines():
        for cell in row.strip("|").split("|") if row.startswith("| ") and "--" not in row else ():
            assert cell.strip() in [*cells, ""], cell
    charts = {caption: rows for caption, rows in page.numbers().items() if caption.startswith("Normalised")}
    assert len(charts) == 3
    for task in results.tasks:
        wanted = [list(vars(task.normalised(line).estimate()).values()) for line in results.merges]
        got = [[float(value) for value in row] for row in charts[f"Normalised scores, {task.task}"]]
        assert got == wanted
    assert panels(page) == 2
    assert "two/fisher/mask_fisher.safetensors is not a whole safetensors file" in page.all("body")[0][1]
    assert sum("heads of one" in caption for caption in page.numbers()) == 1


@pytest.mark.parametrize(("merges", "tasks", "name"), [(1, 1, ""), (12, 3, HOSTILE[0]), (2, 2, HOSTILE[5])])
def test_any_number_of_merges_and_any_name(
    pair: tuple[Path, Path], tmp_path: Path, merges: int, tasks: int, name: str
) -> None:
    recipe = read_recipe(recipe_for(tmp_path, pair))
    page = is_sound(evaluation_page(recipe, made_results(merges, tasks, name)))
    assert len(page.all("figure")) == tasks + (tasks > 1) + 4


def test_many_tasks_are_all_named_and_explained(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, results = read_recipe(recipe_for(tmp_path, pair)), made_results(1, 90, "a-name-of-some-length-")
    text = is_sound(evaluation_page(recipe, results)).all("body")[0][1]
    assert "1 merge of " in text
    for task in results.tasks:
        assert f"99 of {task.data} ({task.task})" in text
    assert "In brackets: 95 % interval from" in text
    text = is_sound(evaluation_page(recipe, made_results(2, 3, "long" * 900))).all("body")[0][1]
    assert "2 merges of " in text
    assert "…ng" in text
    assert "long" * 100 not in text
    assert "In brackets: 95 % interval from" in text


def test_what_is_not_defined_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    results = made_results(2, 1)
    broken = {line: {"accuracy": Resampled(0.0, numpy.zeros(1000))} for line in (OWN, *results.merges)}
    (task,) = results.tasks
    never = TaskScores(task.task, task.model, task.data, task.rows, task.metrics, broken)
    page = is_sound(
        evaluation_page(read_recipe(recipe_for(tmp_path, pair)), Results([never], results.merges))
    )
    assert [text for _, text in page.all("td")].count("n/a") >= 4


def test_the_same_input_gives_the_same_file(pair: tuple[Path, Path]) -> None:
    sidecars = [read(folder / store.BESIDE) for folder in pair]
    assert sidecars_page(sidecars) == sidecars_page(sidecars)


def test_a_users_own_settings_of_matplotlib_change_nothing(pair: tuple[Path, Path]) -> None:
    import matplotlib

    sidecars = [read(pair[0] / store.BESIDE)]
    plain = sidecars_page(sidecars)
    with matplotlib.rc_context(
        {"svg.fonttype": "path", "font.size": 30, "text.color": "red", "axes.grid": True}
    ):
        assert sidecars_page(sidecars) == plain


def test_files_that_cannot_be_written_are_refused_before_anything_is_read(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, nowhere = recipe_for(tmp_path, pair), tmp_path / "none" / "report.html"
    for option in ("--html", "--png"):
        assert f"cannot write {nowhere}: its folder does not exist" in inspect(
            "nothing", option, nowhere, code=1
        )
        assert "it is a folder" in inspect("nothing", option, tmp_path, code=1)
        assert ".yml is the name of a sidecar or a recipe" in inspect("nothing", option, recipe, code=1)
    same = tmp_path / "same"
    assert "two results would be written there" in inspect("nothing", "--html", same, "--png", same, code=1)
    before = recipe.read_bytes()
    evaluated = CliRunner().invoke(app, ["evaluate", "nothing", "merged", "--html", str(recipe)])
    assert evaluated.exit_code == 1
    assert recipe.read_bytes() == before
    assert not same.exists()


def test_a_page_that_fails_leaves_the_old_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("before")
    inspect(pair[0], tmp_path / "nothing", "--html", page, code=1)
    assert page.read_text() == "before"


def test_matplotlib_is_loaded_only_to_draw(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = f"import sys\nsys.argv = ['mergekit-fisher', 'inspect', '{pair[0]}'%s]\n" + (
        "from fisher_mask_mergekit.cli import app\ntry:\n    app()\nexcept SystemExit: pass"
    )
    assert loaded(code % "", "('matplotlib',)").endswith("[]")
    drawn = code % f", '--html', '{tmp_path / 'report.html'}'"
    assert loaded(drawn, "('matplotlib',)").endswith("['matplotlib']")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb\tc", "a b c"), ("a\x00b", "a�b"), ("\u202ea\u200b", "�a�"), ("e\u0301", "e\u0301"), ("\ud800", "�"), ("  ", "")],
)  # fmt: skip
def test_text_is_one_line_of_visible_characters(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_long_text_loses_its_middle() -> None:
    assert clean("a" * 40 + "b" * 40, 9) == "aaaa…bbbb"
    assert clean("漢" * 40, 9) == "漢漢…漢漢"
    assert len(clean("x" * 10**7, 50)) == 50


def test_names_that_look_alike_are_numbered() -> None:
    assert apart(["a", "b", "a ", "\n"]) == ["a (1)", "b", "a (3)", "(no name)"]


def test_only_markup_is_markup() -> None:
    assert element("p", "<b>", Html("<i>")) == "<p>&lt;b&gt;<i></p>"
    assert element("a", class_='"x"', aria_label="<") == '<a class="&quot;x&quot;" aria-label="&lt;"></a>'


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (numpy.float32(0.1), '<data value="0.1">1.000e-01</data>'), (0.1 + 0.2, '<data value="0.30000000000000004">3.000e-01</data>'),
        (0.0, '<data value="0.0">0</data>'), (7, '<data value="7">7</data>'), (float("nan"), "n/a"),
    ],
)  # fmt: skip
def test_a_number_keeps_its_digits(value: Any, wanted: str) -> None:
    assert number(value) == wanted


def test_a_table_that_no_browser_could_show_is_left_out() -> None:
    assert "too large for a page" in table("It", ["a"] * 1000, [[""] * 1000] * 1000)
