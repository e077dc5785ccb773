"""A repository's card: the section about a sidecar and its tags; every other byte stays as it was."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from fisher_mask_mergekit.errors import HubError, RecipeError
from fisher_mask_mergekit.sidecar import Metadata
from fisher_mask_mergekit.untrusted import MOST_RECIPE_VALUES, read_yaml

TAGS = ("fisher-mask-mergekit", "fisher-information")
_BEGIN = "<!-- fisher-mask-mergekit: begin (mergekit-fisher push writes what is in here) -->"
_END = "<!-- fisher-mask-mergekit: end -->"
_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_./+@-]*")
_MOST_BYTES = 1 << 20
"""Of metadata; long lists of results have some hundred thousand."""


def describe(metadata: Metadata, repo: str, path: str, *, is_beside: bool) -> str:
    """What a sidecar is, what it was measured on, and how to merge with it, in Markdown.

    Args:
        metadata: The sidecar's.
        repo: The repository that it is in.
        path: Where in it.
        is_beside: Whether the repository is the checkpoint's own, where a merge finds it by itself.
    """
    settings = metadata.settings
    rows = {
        "checkpoint": metadata.described_checkpoint.replace("'", ""),
        "data": metadata.described_data,
        "samples": f"{metadata.samples}, drawn by seed {settings.seed}, {metadata.max_length} tokens at most",
        "task": metadata.task,
        "accuracy on them": "none" if metadata.accuracy is None else f"{metadata.accuracy:.3f}",
        "loss on them": f"{metadata.loss:.4f} nats",
        "estimator": f"{settings.estimator}, labels {settings.labels}, loss {settings.loss}, masks {settings.mask_placement}",
        "measured": f"{metadata.date}, {settings.dtype}, {metadata.device}, "
        + ", ".join(f"{name} {version}" for name, version in metadata.versions.items()),
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    model = repo if is_beside else metadata.checkpoint
    sidecar = "" if is_beside else f', sidecar: "hub:{repo}/{path}"'
    return f"""\
## Fisher information for merging

[`{path}`]({path}) holds the Fisher information of this checkpoint's mask nodes: how much each attention head and each
FFN neuron matters to its task ([arXiv 2403.09891](https://arxiv.org/abs/2403.09891)). With it,
[mergekit](https://github.com/arcee-ai/mergekit) merges this model with others by `merge_method: fisher_mask` of
fisher-mask-mergekit, without the data. In the recipe, under `models:`:

```yaml
  - model: {_scalar(model)}
    parameters: {{weight: 1.0{sidecar}}}
```

| measured | |
| --- | --- |
{table}
"""


def _scalar(name: str) -> str:
    """A name in YAML, on one line that can neither end its fence nor the section."""
    if _PLAIN.fullmatch(name) and getattr(yaml.compose(name), "tag", "") == "tag:yaml.org,2002:str":
        return name
    return json.dumps(name).replace("`", "\\u0060").replace("<", "\\u003c")


def _cell(text: str) -> str:
    """Text that can neither end a table's cell nor be taken for HTML."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def with_section(card: str, section: str) -> str:
    """The card with the section in its place, or at the end if it has none yet.

    Raises:
        HubError: If the marks that enclose the section are not one of each.
    """
    newline = _newline(card)
    block = newline.join([_BEGIN, "", *section.splitlines(), "", _END])
    if _BEGIN not in card and _END not in card:
        gap = newline * (2 - card.endswith("\n")) if card else ""
        return f"{card}{gap}{block}{newline}"
    before, _, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end or any(mark in before + after for mark in (_BEGIN, _END)):
        raise HubError(
            f"README.md has not one '{_BEGIN}' before one '{_END}'\n  remove what is left of them and push again"
        )
    return before + block + after


def with_tags(card: str) -> str:
    """The card with :data:`TAGS` in its metadata, put before the tags that are there.

    Raises:
        HubError: If the metadata cannot be read, or has something else under ``tags``.
    """
    bom = "\ufeff" if card.startswith("\ufeff") else ""
    text, newline = card.removeprefix(bom), _newline(card)
    found = REGEX_YAML_BLOCK.search(text)
    if found is None:
        front = ["---", "tags:", *(f"- {tag}" for tag in TAGS), "---", ""]
        return bom + newline.join(front) + text
    before = found[2]
    known = _mapping(before)
    tags = known.get("tags") or []
    is_list = isinstance(tags, list)
    missing = [tag for tag in TAGS if not is_list or tag not in tags]
    if not missing:
        return card
    after = _insert(before, missing, newline)
    if not is_list or _loaded(after) != {**known, "tags": [*missing, *tags]}:
        raise HubError(
            f"the metadata of README.md takes no tags as it is written\n  add these to it: {', '.join(missing)}"
        )
    return bom + text[: found.start(2)] + after + text[found.end(2) :]


def _mapping(front: str) -> dict[Any, Any]:
    """What metadata says.

    Raises:
        HubError: If it is no mapping, or too large.
    """
    if len(front.encode()) > _MOST_BYTES:
        raise HubError(
            f"the metadata of README.md has more than {_MOST_BYTES:,} bytes\n  shorten it and push again"
        )
    try:
        return dict(read_yaml(front.encode(), Path("README.md")) or {})
    except (RecipeError, ValueError, TypeError) as error:
        if isinstance(error, RecipeError) and error.__cause__ is None:
            raise HubError(
                f"the metadata of README.md has more than {MOST_RECIPE_VALUES:,} values where its aliases (*) are "
                "written out\n  mend it and push again"
            ) from error
        why = " ".join(str(error.__cause__ or error).split())
        raise HubError(
            f"the metadata of README.md is no mapping in YAML: {why}\n  mend it and push again"
        ) from error


def _loaded(front: str) -> object:
    """What it says; None if that is no YAML, or too much of it."""
    try:
        return read_yaml(front.encode(), Path("README.md"))
    except RecipeError:
        return None


def _insert(front: str, tags: list[str], newline: str) -> str:
    """YAML with tags before the first one; where it was parsed, so that the rest stays as it is written."""
    root = yaml.compose(front)
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    node = next((value for key, value in entries if key.value == "tags"), None)
    if node is None:
        return newline.join([*([front] if front else []), "tags:", *(f"- {tag}" for tag in tags)])
    start = node.start_mark
    if not isinstance(
        node, yaml.SequenceNode
    ):  # Nothing behind 'tags:'; something else is found out by the caller.
        new, place = f" [{', '.join(tags)}]", start.index
    elif node.flow_style:
        new, place = ", ".join(tags) + (", " if node.value else ""), start.index + 1
    else:
        new, place = "".join(f"- {tag}{newline}{' ' * start.column}" for tag in tags), start.index
    return front[:place] + new + front[place:]


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
