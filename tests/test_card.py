"""The card of a repository: what is added, and that nothing else changes."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from fisher_mask_mergekit.errors import HubError
from fisher_mask_mergekit.sharing.card import TAGS, describe, with_section, with_tags
from tests import tiny
from tests.test_sidecar import sidecar_for

SECTION = "## Fisher\n\ntext\n"
BODY = "\n# My model\n\nIt *works*.   \n"
ONE, TWO = TAGS
FRONTS = {
    "no tags": ("license: mit # a comment\nlanguage: 'en'", []),
    "a list": ("tags:\n- bert\n- text-classification\nlicense: mit", ["bert", "text-classification"]),
    "an indented list": ("license: mit\ntags:\n  # mine\n  - bert\nwidget: []", ["bert"]),
    "a list in brackets": ("tags: [bert, 'x: y']\nlicense: mit", ["bert", "x: y"]),
    "a list over lines": ("tags: [\n  bert,\n]\nlicense: mit", ["bert"]),
    "an empty list": ("license: mit\ntags: []", []),
    "an empty entry": ("tags:\nlicense: mit", []),
    "one of them": (f"tags:\n- {TWO}\n- bert", [TWO, "bert"]),
    "a text over lines": ("text: |\n  tags:\n   - none\ntags:\n- bert", ["bert"]),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(("front", "tags"), FRONTS.values(), ids=FRONTS)
def test_tags_are_added_and_no_other_byte_changes(
    front: str, tags: list[str], newline: str, bom: str
) -> None:
    card = f"{bom}---\n{front}\n---\n{BODY}".replace("\n", newline)
    changed = with_tags(card)
    missing = [tag for tag in TAGS if tag not in tags]
    read = ModelCard(changed.removeprefix(bom)).data.to_dict()
    assert read == ModelCard(card.removeprefix(bom)).data.to_dict() | {"tags": [*missing, *tags]}
    assert with_tags(changed) == changed
    lines = iter(changed.splitlines(keepends=True))
    for line in card.splitlines(
        keepends=True
    ):  # All are there, in order; one may have got a list of its own.
        assert any(one == line or (line.startswith("tags:") and one.startswith("tags:")) for one in lines)
    assert len(changed) - len(card) < 80


def test_a_card_without_metadata_gets_some() -> None:
    assert with_tags(BODY) == f"---\ntags:\n- {ONE}\n- {TWO}\n---\n{BODY}"
    assert with_tags(f"---\n\n---\n{BODY}") == with_tags(BODY)
    assert with_tags("") == f"---\ntags:\n- {ONE}\n- {TWO}\n---\n"


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (
            "tags: bert",
            "takes no tags as it is written\n  add these to it: fisher-mask-mergekit, fisher-info",
        ),
        ("tags: 5", "takes no tags as it is written"),
        ("tags: true", "takes no tags as it is written"),
        (f"tags: {ONE} {TWO}", "takes no tags as it is written"),
        ("{license: mit}", "takes no tags as it is written"),
        ("- a list", "is no mapping in YAML"),
        ("a: [", "is no mapping in YAML"),
        ("a: &a [*a]", "has more than 100,000 values where its aliases"),
        (
            "a0: &a0 []\n" + "\n".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60)),
            "has more than 100,000 values where its aliases",
        ),
        ("a: " + "b" * (1 << 20), "has more than 1,048,576 bytes"),
    ],
)
def test_metadata_that_takes_no_tags(front: str, message: str) -> None:
    with pytest.raises(HubError, match=f"the metadata of README.md {message}"):
        with_tags(f"---\n{front}\n---\n{BODY}")


@pytest.mark.parametrize("card", ["", BODY, BODY.rstrip(), BODY.replace("\n", "\r\n")])
def test_a_section_is_added_replaced_and_left(card: str) -> None:
    changed = with_section(card, SECTION)
    assert changed.startswith(card)
    assert with_section(changed, SECTION) == changed
    assert ("\r\n" in changed) == ("\r\n" in card)
    newline = "\r\n" if "\r\n" in card else "\n"
    further = f"{changed}after{newline}"
    other = with_section(further, "## Other\n")
    assert other.startswith(card)
    assert other.endswith(f"-->{newline}after{newline}")
    assert "## Other" in other
    assert "## Fisher" not in other


def test_marks_that_do_not_enclose_anything() -> None:
    whole = with_section("", SECTION)
    begin, end = re.findall(r"<!--.*-->", whole)
    for card in (begin, end, f"{end}\n{begin}", whole + begin, whole + whole):
        with pytest.raises(HubError, match=r"has not one '<!-- .*\n  remove what is left of them and push"):
            with_section(card, SECTION)


def test_the_section_says_what_it_is_and_how_to_use_it() -> None:
    metadata = sidecar_for(tiny.classifier("bert")).metadata
    beside = describe(metadata, "org/bert", "fisher/a.safetensors", is_beside=True)
    assert "  - model: org/bert\n    parameters: {weight: 1.0}\n" in beside
    assert f"| samples | {metadata.samples}, drawn by seed 0" in beside
    assert f"| loss on them | {metadata.loss:.4f} nats |" in beside
    elsewhere = describe(metadata, "org/bert", "fisher/a.safetensors", is_beside=False)
    sidecar = 'sidecar: "hub:org/bert/fisher/a.safetensors"'
    assert f"  - model: {metadata.checkpoint}\n    parameters: {{weight: 1.0, {sidecar}}}" in elsewhere


def test_a_name_is_only_text_in_the_section() -> None:
    metadata = sidecar_for(tiny.classifier("bert")).metadata
    settings = metadata.settings.model_copy(update={"data": "a|b <script>\n# c"})
    metadata = metadata.model_copy(update={"settings": settings})
    assert r"| data | a\|b &lt;script&gt; # c, split" in describe(metadata, "org/a", "b", is_beside=True)


@pytest.mark.parametrize(
    "name",
    ["a\n```\n# Mine", "a\u2028```", "``` <!-- fisher-mask-mergekit: end -->", 'a: "b"', "true", "1e-5"],
)
def test_a_name_is_only_a_name_in_the_recipe(name: str) -> None:
    metadata = sidecar_for(tiny.classifier("bert")).metadata.model_copy(update={"checkpoint": name})
    card = with_section("", describe(metadata, "org/a", "b", is_beside=False))
    assert with_section(card, SECTION) == with_section("", SECTION)
    found = re.search(r"^```yaml\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert found is not None
    assert found[1].count("\n") == 2
    assert yaml.safe_load(found[1])[0]["model"] == name
