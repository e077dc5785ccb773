"""Files from anyone: what is too large, nested, damaged or no file is one error, and what they say is shown plainly."""

import json
import os
import random
import struct
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from fisher_mask_mergekit import store, untrusted
from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.cli.output import print_lines, say
from fisher_mask_mergekit.combine import combine
from fisher_mask_mergekit.data import load_samples, load_texts
from fisher_mask_mergekit.diagonal_sidecar import INDEX, may_replace_diagonal, read_diagonal
from fisher_mask_mergekit.errors import CheckpointError, DataError, FisherMaskError, RecipeError, SidecarError
from fisher_mask_mergekit.loading import load_config
from fisher_mask_mergekit.opening import open_sidecar
from fisher_mask_mergekit.preview.peek import peek
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.shown import shown
from fisher_mask_mergekit.sidecar import METADATA_KEY, may_replace, read, write
from fisher_mask_mergekit.tasks import SequenceClassification
from fisher_mask_mergekit.verify import find
from tests import tiny
from tests.test_cli import run
from tests.test_diagonal_sidecar import first_shard, folder, made_up, write_for  # noqa: F401
from tests.test_sidecar import metadata_for, path, sidecar_for  # noqa: F401

PATIENCE = 20
"""Seconds after which something that must happen is given up."""
HOSTILE = "\x1b[2J\u202eevil\x07\nok: all is well"


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.yml")
    return tmp_path / "pipe.yml"


@pytest.mark.parametrize("reader", [read, read_diagonal, read_recipe])
def test_a_pipe_is_not_waited_for(pipe: Path, reader: Callable[[Path], object]) -> None:
    if reader is read_diagonal:
        pipe.rename(pipe.parent / INDEX)
        pipe = pipe.parent
    with pytest.raises(FisherMaskError, match=r"cannot read (sidecar|recipe) .*: it is no file"):
        reader(pipe)
    assert not may_replace(pipe)


@pytest.mark.parametrize("opened", [
    lambda pipe: open_sidecar(str(pipe)), lambda pipe: find(str(pipe)), lambda pipe: combine([pipe, pipe], Path("out")),
])  # fmt: skip
def test_a_pipe_is_not_waited_for_to_tell_its_kind(pipe: Path, opened: Callable[[Path], object]) -> None:
    raised: list[Exception] = []

    def attempt() -> None:
        try:
            opened(pipe)
        except FisherMaskError as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        os.close(os.open(pipe, os.O_WRONLY))  # Lets go of who waits.
    assert [str(error) for error in raised] == [f"cannot read sidecar {pipe}: it is no file"]
    assert not thread.is_alive()


def test_a_shard_that_is_a_pipe_is_not_there(folder: Path) -> None:  # noqa: F811
    shard = first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(SidecarError, match=f"lacks {shard.name}"):
        read_diagonal(folder)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(SidecarError, match="embedded null byte"):
        read(Path("a\0b"))


def test_a_link_is_followed_as_the_hubs_cache_has_them(path: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "link").symlink_to(path)
    assert read(tmp_path / "link").metadata == read(path).metadata


def test_a_header_beyond_the_bound_is_not_read(path: Path) -> None:  # noqa: F811
    with path.open("wb") as file:
        file.write(struct.pack("<Q", untrusted.MOST_HEADER_BYTES + 1) + b"{")
        file.truncate(untrusted.MOST_HEADER_BYTES + 100)
    with pytest.raises(SidecarError, match="or has a header of more than 33554432 bytes"):
        read(path)


def test_more_tensors_or_values_than_anyone_has(
    path: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(untrusted, "MOST_TENSORS", 3)
    with pytest.raises(SidecarError, match="holds more than 3 tensors"):
        read(path)
    with pytest.raises(SidecarError, match=r"diagonal_fisher-\d.* holds more than 3 tensors"):
        read_diagonal(folder)
    monkeypatch.setattr(untrusted, "MOST_TENSORS", 100)
    monkeypatch.setattr(untrusted, "MOST_JSON_VALUES", 100)
    with pytest.raises(SidecarError, match="has more than 100 values in its metadata"):
        read(path)
    with pytest.raises(SidecarError, match=f"{INDEX} has more than 100 values in its metadata"):
        read_diagonal(folder)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"format_version":' * 200_000, '"\\ud800"', '"text"', "9" * 5000]
)
def test_metadata_that_is_none(path: Path, folder: Path, text: str) -> None:  # noqa: F811
    save_file({"values": torch.zeros(1)}, path, {METADATA_KEY: text})
    with pytest.raises(SidecarError, match="it has no such metadata"):
        read(path)
    (folder / INDEX).write_text(text)
    with pytest.raises(SidecarError, match="it has no format version"):
        read_diagonal(folder)


def test_metadata_that_is_no_text(path: Path) -> None:  # noqa: F811
    header = json.dumps({"__metadata__": {METADATA_KEY: 5}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(SidecarError, match="it has no such metadata"):
        read(path)


def test_a_version_that_is_no_number(path: Path) -> None:  # noqa: F811
    save_file(
        {"values": torch.zeros(1)},
        path,
        {METADATA_KEY: json.dumps({"format_version": [list(range(99))] * 9})},
    )
    with pytest.raises(
        SidecarError, match=r"has format version \[\[0, 1, 2.*\.\.\..*, this program reads 1; upgrade"
    ):
        read(path)


RECIPE = "merge_method: linear\nmodels: [{model: one}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE + "#" * (1 << 18), "is larger than 262144 bytes; that is no recipe"),
        (f"a: &a [*a]\n{RECIPE}", "more than 100,000 values where its aliases"),
        ("a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)) + RECIPE, "more than 100,000 values where its aliases"),
        ("a: " + "[" * 100_000, "is not YAML: maximum recursion depth"),
        ("a: !!python/object/apply:os.system [true]\n" + RECIPE, "is not YAML: could not determine a constructor"),
        ("a: !!int ''\n" + RECIPE, "is not YAML"),
        ("a: !!timestamp soon\n" + RECIPE, "is not YAML"),
        (RECIPE.encode("utf-16"), "is not YAML: 'utf-8' codec"),
        (RECIPE.replace("one", f"one, parameters: {{weight: 1{'0' * 400}}}"), "the weight of one is larger than a number can be"),
        (RECIPE.replace("one", "a" * 256), r"expected a path or hub id of no more than 4095 bytes, 255 between its slashes, got 'aaa"),
        (RECIPE.replace("one", "a/" * 2048), "of no more than 4095 bytes"),
        (RECIPE + f"base_model: org/{'ü' * 128}", "255 between its slashes, got 'org/"),
        (RECIPE + f"fisher: {{data: {'d' * 256}}}", "data: Value error, expected a path or hub id of no more than 4095 bytes"),
        (RECIPE + "fisher: {data: d, samples: 1099511627777}", "samples: Input should be less than or equal to 1099511627776"),
        (RECIPE + "fisher: {data: d, max_length: 1099511627777}", "max_length: Input should be less than or equal to"),
        (RECIPE + "fisher: {data: d, batch_size: 1099511627777}", "batch_size: Input should be less than or equal to"),
        (RECIPE + f"fisher: {{data: {'d' * 8193}}}", "data: String should have at most 8192 characters"),
    ],
)  # fmt: skip
def test_recipes_that_are_not_read(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "recipe.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "recipe.yml")


def test_the_home_of_nobody() -> None:
    with pytest.raises(RecipeError, match="sidecar '~nobody-here/x': Could not determine home"):
        store.expanded("~nobody-here/x")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(RECIPE.replace("one", "&name one") + "base_model: *name\n")
    assert [model.name for model in read_recipe(tmp_path / "recipe.yml").models] == ["one"]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_a_value_is_noticed(path: Path, bit: int) -> None:  # noqa: F811
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1 << bit]))
    with pytest.raises(
        SidecarError, match="is damaged: its checksum is of something else; copy or download it again"
    ):
        read(path)


def test_the_page_says_how_the_checksum_is_made(path: Path) -> None:  # noqa: F811
    page = (Path(__file__).parent.parent / "docs" / "sidecar.md").read_text()
    known: dict[str, Any] = {}
    exec(page.partition("### Checksum")[2].partition("```python\n")[2].partition("```")[0], known)
    content, tensors = path.read_bytes(), load_file(path)
    size = struct.unpack("<Q", content[:8])[0]
    text = json.loads(content[8 : 8 + size])["__metadata__"][METADATA_KEY]
    described = {
        name: (str(tensor.dtype)[6:], tuple(tensor.shape), tensor.numpy().tobytes())
        for name, tensor in tensors.items()
    }
    body = text.partition(',"checksum"')[0]
    assert text == f'{body},"checksum":"{known["checksum"](body, described)}"}}'


def test_values_in_each_others_place_are_noticed(path: Path) -> None:  # noqa: F811
    tensors, size = load_file(path), struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    one, other = (f"model.layers.{layer}.mlp.down_proj.neuron_fisher" for layer in (0, 1))
    save_file(tensors | {one: tensors[other], other: tensors[one]}, path, metadata)
    with pytest.raises(SidecarError, match="is damaged"):
        read(path)


def test_a_sidecar_without_a_checksum(path: Path) -> None:  # noqa: F811
    metadata = {METADATA_KEY: metadata_for(read(path).metadata.sites).model_dump_json()}
    save_file(load_file(path), path, metadata)
    with pytest.raises(
        SidecarError,
        match="does not end its metadata with a checksum; measure the checkpoint again",
    ):
        read(path)


def test_a_damaged_shard_or_index_is_noticed(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    shard = first_shard(folder)
    sidecar = read_diagonal(folder)
    record = sidecar.metadata.tensors[0]
    tensors = load_file(shard)
    tensors[record.names[0]][0, 0] *= 2
    save_file(tensors, shard)
    with pytest.raises(
        SidecarError, match=f"{shard}: {record.names[0]} is damaged: its checksum is of something else"
    ):
        sidecar.fisher(record)
    # One of another measurement of the same model.
    model = tiny.classifier("bert")
    write_for(model, tmp_path / "other", made_up(model, seed=1))
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(SidecarError, match="is damaged"):
        read_diagonal(folder).fisher(record)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"mean":0.', '"mean":1.'))
    with pytest.raises(SidecarError, match=f"{INDEX} is damaged"):
        read_diagonal(folder)
    assert may_replace_diagonal(folder)


def test_an_index_of_safetensors_leads_to_no_pickle(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    assert "model.safetensors.index.json is not an index of weights" in run("sites", model, code=1).output


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_a_checkpoints_json_beyond_the_bounds_is_not_read(tmp_path: Path, name: str) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    with (model / name).open("ab") as file:
        file.truncate(1 << 40)  # Of zeros that take no room.
    assert f"{model / name} is larger than " in run("sites", model, code=1).stderr
    (model / name).unlink()
    if "bin" in name:
        (model / "model.safetensors").unlink()
    (model / name).write_text("[" * 100_000)
    assert "is not " in run("sites", model, code=1).stderr


@pytest.mark.parametrize(("change", "says"), [
    ({"model_type": []}, r"config.json has model_type \[\], expected a string"),
    ({"model_type": {}, "auto_map": {"AutoConfig": "a.B"}}, r"config.json has model_type {}, expected a string"),
    ({"auto_map": 5}, "config.json has auto_map 5, expected an object"),
    ({"auto_map": "AutoConfig"}, "config.json has auto_map 'AutoConfig', expected an object"),
    ({"architectures": 5}, "config.json has architectures 5, expected a list of strings"),
    ({"architectures": "Bert"}, "config.json has architectures 'Bert', expected a list of strings"),
    ({"architectures": ["Bert", [[0] * 99] * 99]}, r"architectures \['Bert', .*\.\.\..*\], expected a list of strings"),
])  # fmt: skip
def test_a_configuration_whose_fields_are_of_other_types(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    checkpoint = locate(str(tiny.checkpoint(tmp_path / "model")))
    file = checkpoint.folder / "config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | change))
    for look in (
        lambda: load_config(checkpoint, trust_remote_code=False),
        lambda: peek(checkpoint.name).model(),
    ):
        with pytest.raises(CheckpointError, match=says):
            look()
    file.write_text(json.dumps(document | dict.fromkeys(["auto_map", "architectures"])))
    assert peek(checkpoint.name).architecture == "no class"


def saved(state: Any, *, as_zip: bool) -> bytes:
    file = BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=as_zip)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
def test_weights_that_are_damaged_are_one_error(tmp_path: Path, as_zip: bool) -> None:
    checkpoint = locate(str(tiny.checkpoint(tmp_path / "model")))
    (checkpoint.folder / "model.safetensors").unlink()
    file, whole = checkpoint.folder / "pytorch_model.bin", saved({"a": torch.ones(2, 2)}, as_zip=as_zip)
    file.write_bytes(whole)
    assert tensor_shapes(checkpoint) == {"a": (2, 2)}
    draw, refused = random.Random(0), 0
    for size in range(0, len(whole), max(1, len(whole) // 80)):
        changed = bytearray(whole)
        for _ in range(3):
            changed[draw.randrange(len(whole))] = draw.randrange(256)
        for content in (whole[:size], bytes(changed)):
            file.write_bytes(content)
            try:
                tensor_shapes(checkpoint)
            except CheckpointError as error:
                assert "pytorch_model.bin" in str(error)  # noqa: PT017 - it may be none, too
                refused += 1
    assert refused > 80


@pytest.mark.parametrize("state", [{0: torch.ones(2)}, {"a": 5}, [torch.ones(2)]])
def test_weights_that_are_no_named_tensors(tmp_path: Path, state: Any) -> None:
    checkpoint = locate(str(tiny.checkpoint(tmp_path / "model")))
    (checkpoint.folder / "model.safetensors").unlink()
    (checkpoint.folder / "pytorch_model.bin").write_bytes(saved(state, as_zip=True))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds other things than tensors"):
        tensor_shapes(checkpoint)


def test_a_folder_with_an_at_behind_it_is_not_that_folder(tmp_path: Path) -> None:
    name = f"{tiny.checkpoint(tmp_path / 'model')}@"
    for look in (locate, peek):
        with pytest.raises(CheckpointError, match=f"there is no folder {name}"):
            look(name)


def test_a_table_whose_rows_are_elsewhere(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    table.save_to_disk(tmp_path / "table")
    state = tmp_path / "table" / "state.json"
    said = json.loads(state.read_text())
    (name,) = (file["filename"] for file in said["_data_files"])
    elsewhere = (tmp_path / "table" / name).rename(tmp_path / name)
    for given in (str(elsewhere), f"../{name}"):
        state.write_text(json.dumps(said | {"_data_files": [{"filename": given}]}))
        with pytest.raises(DataError, match=f"state.json names '{given}', which is not in the folder"):
            load_samples(
                FisherSettings(data=str(tmp_path / "table")), SequenceClassification(label2id={"0": 0})
            )


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_dict({"text": ["plain"], "label": [0]}).to_parquet(file)
    Path(file).write_bytes(Path(file).read_bytes().replace(b"plain", b"pl\xffin"))
    task = SequenceClassification(label2id={"0": 0})
    for load in (load_samples, load_texts):
        with pytest.raises(
            DataError, match=r"cannot read the rows of data .*rows\.parquet': 'utf-8' codec can't decode"
        ):
            load(FisherSettings(data=file), task)


@pytest.mark.parametrize("text", ["null", "  null\n{}", "\ufeffnull", '{"text": "a", "label": 0}\n\tnull{}'])
def test_a_row_that_ends_pyarrow(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(
        DataError,
        match=rf"rows.jsonl', line {1 + text.count(chr(10) + chr(9))}: expected a JSON object, got null",
    ):
        load_samples(
            FisherSettings(data=str(tmp_path / "rows.jsonl")), SequenceClassification(label2id={"0": 0})
        )


def test_what_a_file_says_cannot_move_the_cursor_or_begin_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "\ufffd[2J\ufffdevil\ufffd\ufffdok: all is well"
    assert shown(HOSTILE) == plain == str(FisherMaskError(HOSTILE))
    assert shown("Grüße, 漢字 e\u0301") == "Grüße, 漢字 e\u0301"
    assert str(FisherMaskError("one\n  two")) == "one\n  two"
    print_lines([HOSTILE])
    say(HOSTILE)
    assert capsys.readouterr() == (f"{plain}\n", f"{plain}\n")


def test_tables_and_errors_show_a_hostile_sidecar_plainly(tmp_path: Path) -> None:
    model = tiny.classifier("bert")
    made = sidecar_for(model)
    hostile = metadata_for(made.metadata.sites, checkpoint=f"'; rm -rf ~; {HOSTILE}", device=HOSTILE)
    write(type(made)(hostile, made.fisher, made.values), tmp_path / store.BESIDE)
    for said in (run("inspect", tmp_path).output, run("inspect", tmp_path, "--json").output):
        assert not any(mark in said for mark in ("\x1b", "\u202e", "\x07"))
        assert "\nok: all is well" not in said


def test_a_command_in_an_error_is_quoted(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tiny.classifier("bert")
    write_for(model, folder, made_up(model), checkpoint="x; touch gone")
    first_shard(folder).unlink()
    with pytest.raises(SidecarError, match="mergekit-fisher compute 'x; touch gone' --kind diagonal"):
        read_diagonal(folder)
