"""Damaged and hostile files, made of sound ones: hypothesis strategies for `fuzz.py` and the tests."""

import copy
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from hypothesis import assume
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fisher_mask_mergekit.diagonal_sidecar import INDEX
from fisher_mask_mergekit.seal import digest, seal

Draw = Callable[[st.SearchStrategy[Any]], Any]
Files = Mapping[str, bytes]

# What has broken readers: other types, bounds of integers, no numbers, paths, commands, tags, escapes, deep nesting.
_SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "1", "NaN", "../../../etc/passwd", "/dev/zero", "$(touch gone)", "'; touch gone; '", "\x1b[2J", "\u202e", "\x00", "\n",
    "a" * 10_000, "values", "mean", "F64", "BF16", "I64", "mask", "diagonal", "attention", "ffn", "(q k v)",
)  # fmt: skip
_NESTED: tuple[Any, ...] = ([], {}, [[]], {"a": {}}, [0] * 1000, json.loads("[" * 150 + "]" * 150), {"__class__": "os.system"})  # fmt: skip
_SNIPPETS = (
    b"\x00", b"\xff\xfe", b'"', b"{", b"[" * 2000, b"}", b"*a", b"&a [*a]", b"<<: *a", b"!!python/object/apply:os.system [true]",
    b"!!int ''", b"!!timestamp x", b"!!binary x", b"? ", b"- ", b"\n---\n", b"\t", b": ", b"9" * 5000, b"1e999", b"\\ud800", b",,",
    b"\xe2\x80\xae", b"\x1b[2J", b"0x", b"1:2:3",
)  # fmt: skip

scalars = st.sampled_from(_SCALARS) | st.integers() | st.floats() | st.text(max_size=20)
values = scalars | st.sampled_from(_NESTED).map(copy.deepcopy) | st.lists(scalars, max_size=4)


@st.composite
def flipped(draw: Draw, content: bytes) -> bytes:
    """One to four bits are others."""
    made = bytearray(content)
    for place in draw(st.lists(st.integers(0, 8 * len(made) - 1), min_size=1, max_size=4)):
        made[place // 8] ^= 1 << place % 8
    return bytes(made)


@st.composite
def cut(draw: Draw, content: bytes) -> bytes:
    """The end is gone, the beginning, or a part; or there is more."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    parts = (content[:start], content[end:], content[:start] + content[end:], content + content[start:end])
    return draw(st.sampled_from(parts))


@st.composite
def overwritten(draw: Draw, content: bytes) -> bytes:
    """Something else stands in it, in place of what was there or before it."""
    place = draw(st.integers(0, len(content)))
    inserted = draw(st.sampled_from(_SNIPPETS) | st.binary(max_size=16))
    return content[:place] + inserted + content[place + draw(st.sampled_from((0, len(inserted)))) :]


def bytes_of(content: bytes) -> st.SearchStrategy[bytes]:
    """Any of these."""
    return st.one_of(flipped(content), cut(content), overwritten(content))


@st.composite
def tree_of(draw: Draw, tree: Any) -> Any:
    """One to three places of a document hold something else, are gone, are there twice or have another name."""
    made = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(made))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(("value", "value", "gone", "other", "more")))
        if change == "value":
            holder[key] = draw(values)
        elif change == "gone":
            del holder[key]
        elif change == "other":  # Another place's.
            source, where = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(source[where])
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[draw(st.text(max_size=8) | st.sampled_from(("checksum", "__metadata__", "kind")))] = draw(
                values
            )
    assume(made != tree)
    return made


def _places(tree: Any) -> Any:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the rest."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


@st.composite
def header_of(draw: Draw, content: bytes) -> bytes:
    """The file's header says something else, or has another size."""
    header, rest = split(content)
    made = joined(draw(tree_of(header)), rest)
    if draw(st.booleans()):
        return made
    size = draw(st.sampled_from((0, 1, 2**25, 2**31, 2**63, 2**64 - 1)) | st.integers(0, len(content)))
    return struct.pack("<Q", size) + content[8:]


@st.composite
def metadata_of(draw: Draw, content: bytes, sealed: bool = False) -> bytes:
    """The metadata says something else.

    Args:
        draw: hypothesis's.
        content: A sidecar.
        sealed: Whether it has the checksum of what it says.
    """
    header, rest = split(content)
    key, text = _metadata(header)
    metadata = json.loads(text)
    checksum = metadata.pop("checksum")
    made = json.dumps(draw(tree_of(metadata)), separators=(",", ":"))
    made = seal(made, load(content)) if sealed else f'{made[:-1]},"checksum":"{checksum}"}}'
    return joined(header | {"__metadata__": {key: made}}, rest)


def _metadata(header: Mapping[str, Any]) -> tuple[str, str]:
    """What a sidecar says of itself, after the key that its kind has for it."""
    (found,) = header["__metadata__"].items()
    key, text = found
    return key, text


@st.composite
def tensors_of(draw: Draw, content: bytes, sealed: bool = False) -> bytes:
    """Tensors are in each other's place, or have another name, shape, dtype or value; or one is gone, or too many."""
    key, text = _metadata(split(content)[0])
    made = draw(exchanged(load(content)))
    return save(made, {key: seal(text.rpartition(',"checksum"')[0] + "}", made) if sealed else text})


@st.composite
def exchanged(draw: Draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change that :func:`tensors_of` makes."""
    one, other = draw(st.lists(st.sampled_from(sorted(tensors)), min_size=2, max_size=2))
    change = draw(st.sampled_from(("swap", "value", "gone", "name", "shape", "dtype")))
    made = dict(tensors)
    if change == "swap":
        made[one], made[other] = made[other], made[one]
    elif change == "value":
        made[one] = made[one].clone()
        made[one].view(-1)[draw(st.integers(0, made[one].numel() - 1))] = draw(st.floats(width=32))
    elif change == "gone":
        del made[one]
    elif change == "name":
        made[draw(st.text(st.characters(codec="ascii"), max_size=8))] = made.pop(one)
    elif change == "shape":
        made[one] = draw(st.sampled_from((made[one][None], made[one].flatten()[1:], made[one].flatten())))
    else:
        made[one] = made[one].to(
            draw(st.sampled_from((torch.float64, torch.bfloat16, torch.int64, torch.bool)))
        )
    return {name: tensor.clone() for name, tensor in made.items()}


@st.composite
def folder_of(draw: Draw, files: Files, others: Files) -> Files:
    """A full-size sidecar in which a file is damaged, gone or another's.

    Args:
        draw: hypothesis's.
        files: By name.
        others: Those of another measurement of the same model.
    """
    made = dict(files)
    name = draw(st.sampled_from(sorted(files)))
    change = draw(
        st.sampled_from(("bytes", "bytes", "inside", "inside", "inside", "swap", "another's", "gone"))
    )
    if change == "bytes":
        made[name] = draw(bytes_of(files[name]))
    elif change == "inside":
        if name == INDEX:
            index = json.loads(files[INDEX])
            checksum = index.pop("checksum")
            made[name] = f'{json.dumps(draw(tree_of(index)))[:-1]},"checksum":"{checksum}"}}'.encode()
        else:
            made[name] = draw(header_of(files[name]) | exchanged(load(files[name])).map(save))
    elif change == "swap":
        made[name], made[other] = files[other := draw(st.sampled_from(sorted(files)))], files[name]
    elif change == "another's":
        made[name] = others[name]
    else:
        del made[name]
    return made


@st.composite
def sealed_folder_of(draw: Draw, files: Files) -> Files:
    """A full-size sidecar whose index says something else, and has the checksums of what it and the shards say."""
    made, index = dict(files), json.loads(files[INDEX])
    del index["checksum"]
    if draw(st.booleans()):
        shard = draw(st.sampled_from(sorted(set(files) - {INDEX})))
        tensors = draw(exchanged(load(files[shard])))
        made[shard] = save(tensors)
        for record in index["tensors"]:
            if record["names"][0] in tensors:
                record["sha256"] = digest([tensors[record["names"][0]]])
    else:
        index = draw(tree_of(index))
    made[INDEX] = seal(json.dumps(index), {}).encode("utf-8", "replace")
    return made


def recipe_of(text: str) -> st.SearchStrategy[bytes]:
    """A recipe that is damaged as text, or says something else."""
    trees = tree_of(yaml.safe_load(text)).map(lambda tree: yaml.safe_dump(tree, allow_unicode=True))
    return bytes_of(text.encode()) | trees.map(lambda made: made.encode("utf-8", "replace"))


def rows_of(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON Lines file that is damaged as text, or says something else."""
    rows = [json.loads(line) for line in content.splitlines()]
    trees = tree_of(rows).map(lambda made: b"".join(json.dumps(row).encode() + b"\n" for row in made))
    return bytes_of(content) | trees
