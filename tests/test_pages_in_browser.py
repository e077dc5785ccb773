"""Pages in a real browser without a window: as read, as tabbed through, on a phone, in the dark."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from fisher_mask_mergekit.pages.evaluate_page import evaluation_page
from fisher_mask_mergekit.pages.inspect_page import recipe_page, sidecars_page
from fisher_mask_mergekit.preview.inspection import recipe_shares
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.sidecar import Sidecar, read
from fisher_mask_mergekit.store import BESIDE
from tests import tiny
from tests.browser import ask, browser, open_page
from tests.test_check import measure, recipe_for
from tests.test_pages import HOSTILE, hostile_sidecar, made_results
from tests.test_sidecar import sidecar_for

pytestmark = pytest.mark.xdist_group("browser")  # What they share is made once.
PAGES = ("sidecars", "recipe", "evaluation", "hostile")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def sidecars() -> list[Sidecar]:
    """Of models with many layers and heads, whose key-value heads are shared."""
    shape = {"num_hidden_layers": 26, "num_attention_heads": 64, "hidden_size": 128, "num_key_value_heads": 4}
    wide = sidecar_for(tiny.classifier("llama", **shape), seed=0)
    wide.fisher[wide.metadata.sites[0].output]["head_fisher"][3:9] = 0
    return [wide, sidecar_for(tiny.classifier("bert"), scale=1e-7, seed=1)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, sidecars: list[Sidecar]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = tiny.checkpoint(folder / "one")
    two = tiny.sibling(folder / "two", one, seed=1)
    for seed, checkpoint in enumerate((one, two)):
        measure(checkpoint, seed)
    recipe = read_recipe(recipe_for(folder, (one, two)))
    texts = {
        "sidecars": sidecars_page(sidecars),
        "recipe": recipe_page("recipe.yml", *recipe_shares(recipe)),
        "evaluation": evaluation_page(recipe, made_results(12, 2, HOSTILE[5])),
        "hostile": sidecars_page([hostile_sidecar(name) for name in HOSTILE]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def requests(driver: Any) -> list[str]:
    """What the browser asked anyone for since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    events = [(message["method"].rpartition(".")[2], message["params"]) for message in messages]
    blocked = {
        given["requestId"]
        for event, given in events
        if event == "loadingFailed" and given.get("blockedReason")
    }
    sent = {
        given["requestId"]: given["request"]["url"] for event, given in events if event == "requestWillBeSent"
    }
    return [url for key, url in sent.items() if key not in blocked and not url.startswith("data:")]


@pytest.mark.parametrize("name", PAGES)
def test_opens_without_an_error_or_a_request(driver: Any, pages: dict[str, Path], name: str) -> None:
    open_page(driver, pages[name])
    assert requests(driver) == [pages[name].as_uri()]
    assert driver.get_log("browser") == []
    assert ask(driver, "return document.compatMode") == "CSS1Compat"
    wanted = {"sidecars": 2, "recipe": 2, "evaluation": 2, "hostile": len(HOSTILE)}[name]
    assert ask(driver, "return document.querySelectorAll('section.model').length") == wanted
    assert ask(driver, "return document.querySelectorAll('section.model > h2').length") == wanted


def test_the_log_and_the_requests_would_show_what_is_wrong(driver: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('no')</script><img src='other.png'>")
    open_page(driver, page)
    assert len(driver.get_log("browser")) >= 1
    assert len(requests(driver)) == 2


def test_nothing_can_run_even_if_it_got_in(driver: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    attack = "<script>document.title = 'run'</script><img src='x.png' onerror=\"document.title = 'run'\">"
    page.write_text(pages["recipe"].read_text().replace("</main>", f"{attack}</main>"))
    open_page(driver, page)
    assert ask(driver, "return document.title") == "What recipe.yml merges"
    assert requests(driver) == [page.as_uri()]


def test_numbers_are_the_sidecars(driver: Any, pages: dict[str, Path], sidecars: list[Sidecar]) -> None:
    open_page(driver, pages["sidecars"])
    script = """return [...document.querySelectorAll('section.model')].map(section =>
        [...section.querySelectorAll('table')].map(table => [...table.tBodies[0].rows].map(row =>
            [...row.querySelectorAll('td')].map(cell => [cell.firstChild.value, cell.textContent]))))"""
    for sidecar, tables in zip(sidecars, ask(driver, script), strict=True):
        sites = [site for site in sidecar.metadata.sites if site.kind == "attention"]
        for node, rows in (("head_fisher", tables[0]), ("kv_head_fisher", tables[1])):
            if node == "kv_head_fisher" and len(tables) == 2:
                continue
            vectors: list[list[float]] = [sidecar.fisher[site.output][node].tolist() for site in sites]  # type: ignore[index]
            assert [[float(numpy.float32(exact)) for exact, _ in row] for row in rows] == vectors
            shown = [float(text) for row in rows for _, text in row]
            assert shown == pytest.approx([value for row in vectors for value in row], rel=5e-4)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 360, 1200])
def test_only_tables_scroll_sideways(driver: Any, pages: dict[str, Path], name: str, width: int) -> None:
    open_page(driver, pages[name], width=width)
    ask(driver, "document.querySelectorAll('details').forEach(part => part.open = true)")
    assert ask(driver, "return document.documentElement.scrollWidth") <= width
    script = """return [...document.querySelectorAll('body *:not(svg *)')].filter(part =>
        !part.closest('.scroll > *') && !part.matches('.skip') && part.getBoundingClientRect().right > arguments[0] + 1
    ).map(part => part.outerHTML.slice(0, 200))"""
    assert ask(driver, script, width) == []


@pytest.mark.parametrize("name", PAGES)
def test_text_in_pictures_is_inside_them_and_large_enough(
    driver: Any, pages: dict[str, Path], name: str
) -> None:
    open_page(driver, pages[name], width=360)
    script = """return [...document.querySelectorAll('figure svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1 || parseFloat(getComputedStyle(text).fontSize) * frame.width
                / svg.viewBox.baseVal.width < 8.5;
        }).map(text => text.textContent)})"""
    assert ask(driver, script) == []


@pytest.mark.parametrize("name", PAGES)
def test_names_of_ticks_do_not_collide(driver: Any, pages: dict[str, Path], name: str) -> None:
    open_page(driver, pages[name])
    script = """return [...document.querySelectorAll('figure svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim());
        const boxes = texts.map(text => text.getBoundingClientRect());
        return boxes.flatMap((one, i) => boxes.slice(i + 1).filter(other => one.left < other.right - 1
            && other.left < one.right - 1 && one.top < other.bottom - 4 && other.top < one.bottom - 4
        ).map(() => texts[i].textContent))})"""
    assert ask(driver, script) == []


CONTRASTS = """
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const linear = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const behind = part => {
    for (; part; part = part.parentElement) {
        const colour = parse(getComputedStyle(part).backgroundColor);
        if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
};
return [...document.querySelectorAll('body *')].filter(part => [...part.childNodes].some(
    node => node.nodeType === 3 && node.textContent.trim())).map(part => {
    const style = getComputedStyle(part);
    const ends = [part.closest('svg') ? style.fill : style.color].map(parse).concat([behind(part)]).map(light).sort();
    return [(Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05), part.outerHTML.slice(0, 120)];
}).filter(([ratio]) => !(ratio >= arguments[0]))"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(driver: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    open_page(driver, pages[name], scheme=scheme)
    ask(driver, "document.querySelectorAll('details').forEach(part => part.open = true)")
    assert ask(driver, CONTRASTS, 4.5) == []
    # The same measure sees what it looks for.
    assert len(ask(driver, CONTRASTS, 17)) > 10


def test_the_dark_scheme_is_dark_in_pictures_too(driver: Any, pages: dict[str, Path]) -> None:
    script = """return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        ...['svg text', 'svg path[style*=stroke]'].map(what => {
            const style = getComputedStyle(document.querySelector(what));
            return what.endsWith('text') ? style.fill : style.stroke})]"""
    found = {}
    for scheme in ("light", "dark"):
        open_page(driver, pages["sidecars"], scheme=scheme)
        ground, ink, *drawn = found[scheme] = ask(driver, script)
        assert drawn == [ink, ink]
        levels = [sum(int(part) for part in colour[4:-1].split(",")) for colour in (ground, ink)]
        assert (levels[0] < levels[1]) == (scheme == "dark")
    assert all(light != dark for light, dark in zip(found["light"], found["dark"], strict=True))


@pytest.mark.parametrize("name", ["recipe", "evaluation"])
def test_the_keyboard_reaches_everything(driver: Any, pages: dict[str, Path], name: str) -> None:
    open_page(driver, pages[name])
    wanted = ask(driver, "return document.querySelectorAll('a, summary, .scroll').length")
    label = """const part = document.activeElement, style = getComputedStyle(part);
        return part === document.body ? null : [part.matches('summary') ? 'summary' : part.className || part.tagName,
            part.getAttribute('aria-label') || part.textContent, style.outlineStyle !== 'none']"""
    reached = []
    for _ in range(wanted + 1):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        if (found := ask(driver, label)) is None:
            break
        reached.append(found)
        if found[0] == "summary":
            ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert len(reached) == wanted
    assert reached[0][0] == "skip"
    assert all(visible for _, _, visible in reached)
    assert ask(driver, "return document.querySelectorAll('details:not([open])').length") == 0
    for kind in ("summary", "scroll"):
        labels = [label for what, label, _ in reached if what == kind]
        assert len(labels) > 3
        assert len(set(labels)) == len(labels), "two things sound alike"


def test_the_skip_link_leads_to_the_content(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["recipe"])
    ActionChains(driver).send_keys(Keys.TAB).perform()
    assert ask(driver, "return document.activeElement.getBoundingClientRect().left") >= 0
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert ask(driver, "return document.activeElement.tagName") == "MAIN"


def test_a_screen_reader_is_told_what_there_is(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["recipe"])
    driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    pictures = names.get("image", []) + names.get("img", [])
    assert len(pictures) == ask(driver, "return document.querySelectorAll('figure svg').length") == 7
    assert all("layers" in name for name in pictures)
    assert len(names["heading"]) == 1 + 3 + 7
    assert {"one", "two", "Each model's share of every layer"} <= set(names["region"])
    assert "Contents" in names["navigation"]


def test_the_panel_shows_what_was_measured(driver: Any, pages: dict[str, Path]) -> None:
    open_page(driver, pages["recipe"])
    script = "return [...document.querySelectorAll('#model-1 dd')].map(part => part.textContent)"
    assert "glue:sst2, split train, 9 rows" in ask(driver, script)
    assert read(pages["recipe"].parent / "one" / BESIDE).source in ask(driver, script)
