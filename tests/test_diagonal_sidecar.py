"""The full-size sidecar: what is written is read back, and nothing else is accepted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit import diagonal_sidecar
from fisher_mask_mergekit.blocks import blocks
from fisher_mask_mergekit.diagonal_sidecar import (
    INDEX,
    DiagonalMetadata,
    DiagonalSidecar,
    TensorRecord,
    may_replace_diagonal,
    plan_shards,
    read_diagonal,
    write_diagonal,
)
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.seal import digest, seal
from fisher_mask_mergekit.settings import FisherSettings
from tests import tiny
from tests.test_sidecar import metadata_for

WEIGHT = "bert.encoder.layer.0.output.dense.weight"


def made_up(model: Any, scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.rand(value.shape, generator=generator) for name, value in model.named_parameters()
    }


def write_for(model: Any, folder: Path, fisher: dict[str, Tensor], **changes: Any) -> DiagonalSidecar:
    """A sidecar of made-up Fisher information for a model."""
    shards = plan_shards({name: tuple(value.shape) for name, value in fisher.items()})
    parameters = dict(model.named_parameters())
    facts = {
        name: value for name, value in metadata_for(tiny.sites_of(model)) if name not in ("sites", "settings")
    }
    total, count = (
        sum(float(value.double().sum()) for value in fisher.values()),
        sum(map(Tensor.numel, fisher.values())),
    )
    metadata = DiagonalMetadata(
        settings=FisherSettings(data="glue:sst2", kind="diagonal"),
        mean=total / count,
        others=tuple(name for name in model.state_dict() if name not in parameters),
        tensors=tuple(
            TensorRecord(
                names=(name,), shape=tuple(value.shape), shard=shards[name],
                values=tuple(probe(parameters[name]).double().tolist()),
            )
            for name, value in fisher.items()
        ),
        views=(),
        **facts | changes,
    )  # fmt: skip
    return write_diagonal(metadata, fisher.__getitem__, folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(diagonal_sidecar, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(diagonal_sidecar, "CPU_BYTES", 1000)
    model = tiny.classifier("bert")
    write_for(model, tmp_path / "diagonal", made_up(model))
    return tmp_path / "diagonal"


def test_what_is_written_is_read_back_tensor_by_tensor(folder: Path) -> None:
    model = tiny.classifier("bert")
    wanted = made_up(model)
    sidecar = read_diagonal(folder)
    assert sidecar.metadata.checkpoint == "somebody/bert-sst2"
    for name, value in model.named_parameters():
        record = sidecar.identify(name, value)
        assert record is not None
        assert_close(sidecar.fisher(record), wanted[name], rtol=0, atol=0)
    assert sidecar.source == str(folder)


def test_shards_are_no_larger_than_they_may_be_but_for_one_tensor(folder: Path) -> None:
    shards = sorted(file for file in folder.iterdir() if file.name != INDEX)
    assert [shard.name for shard in shards] == [
        f"diagonal_fisher-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(4 * value.numel() for value in tensors.values()) <= 20_000
    assert plan_shards({"a": (3,), "b": (2, 2)}) == {
        "a": "diagonal_fisher-00001-of-00001.safetensors",
        "b": "diagonal_fisher-00001-of-00001.safetensors",
    }


def test_a_missing_shard_is_named_with_what_to_do(folder: Path) -> None:
    count = len(list(folder.iterdir())) - 1
    (folder / f"diagonal_fisher-00002-of-{count:05}.safetensors").unlink()
    with pytest.raises(SidecarError) as caught:
        read_diagonal(folder)
    assert str(caught.value) == (
        f"{folder} lacks diagonal_fisher-00002-of-{count:05}.safetensors ({count - 1} of its {count} shards are there). "
        "Copy the whole folder, or measure again:  mergekit-fisher compute somebody/bert-sst2 --kind diagonal "
        "--data DATASET"
    )


def test_replacing_one_leaves_nothing_else_behind(folder: Path) -> None:
    model = tiny.classifier("bert", seed=1)
    write_for(model, folder, made_up(model, scale=2.0))
    assert read_diagonal(folder).metadata.mean == pytest.approx(1.0, rel=0.01)
    assert [path.name for path in folder.parent.iterdir()] == ["diagonal"]


def test_a_failure_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    model = tiny.classifier("bert")
    with monkeypatch.context() as patched:
        patched.setattr(diagonal_sidecar, "save_file", full)
        with pytest.raises(
            SidecarError, match=r"cannot write .*: No space left on device; nothing was written"
        ):
            write_for(model, folder, made_up(model))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["diagonal"]


def test_nothing_but_such_a_folder_may_be_replaced(folder: Path, tmp_path: Path) -> None:
    assert may_replace_diagonal(tmp_path / "none")
    assert may_replace_diagonal(folder)
    (folder / INDEX).unlink()  # Broken, but nobody else's.
    assert may_replace_diagonal(folder)
    (folder / "notes.txt").write_text("mine")
    assert not may_replace_diagonal(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not may_replace_diagonal(tmp_path / "link")
    assert not may_replace_diagonal(folder / "notes.txt")


def test_a_tensor_is_known_by_its_values(folder: Path) -> None:
    model = tiny.classifier("bert")
    sidecar = read_diagonal(folder)
    value = model.get_parameter(WEIGHT)
    moved = sidecar.identify(WEIGHT.replace("layer.0", "layer.1"), value)
    assert moved == sidecar.records[WEIGHT]
    assert sidecar.identify(WEIGHT, value.bfloat16()) == sidecar.records[WEIGHT]
    with pytest.raises(
        SidecarMismatchError, match=r"was measured on 'somebody/bert-sst2' \(revision 95f0f6f\)"
    ):
        sidecar.identify(WEIGHT, value * 1.01)
    with pytest.raises(SidecarMismatchError, match=r"it knows no tensor 'bert\.other\.weight'"):
        sidecar.identify("bert.other.weight", value)
    old = "bert.embeddings.LayerNorm.gamma"
    assert sidecar.identify(old, model.bert.embeddings.LayerNorm.weight) is not None


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        del index["checksum"]
        change(index)
        (folder / INDEX).write_text(seal(json.dumps(index), {}))

    return edit


def first_shard(folder: Path) -> Path:
    return min(file for file in folder.iterdir() if file.name != INDEX)


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(first_shard(folder))
        change(tensors)
        save_file(tensors, first_shard(folder))

    return edit


WORDS = "bert.embeddings.word_embeddings.weight"


def view(**fields: Any) -> Callable[[Path], None]:
    record = {"name": "v", "source": WORDS, "shape": [4], "offset": 0, "strides": [1], "values": [0.0] * 4}
    return edited(lambda index: index["views"].append(record | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), "cannot read sidecar .*: No such file"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), "has no format version"),
        (lambda folder: (folder / INDEX).write_text("[]"), "has no format version"),
        (lambda folder: (folder / INDEX).write_text("{"), "has no format version"),
        (edited(lambda index: index.update(format_version=2)), "has format version 2, this program reads 1"),
        (edited(lambda index: index.update(more=1)), "metadata field 'more': Extra inputs"),
        (edited(lambda index: index.update(mean=-1.0)), "metadata field 'mean'"),
        (edited(lambda index: index["tensors"][0].update(shard="../model.safetensors")), "metadata field 'tensors.0.shard'"),
        (edited(lambda index: index["tensors"][0].update(shard="/etc/passwd")), "metadata field 'tensors.0.shard'"),
        (edited(lambda index: index["tensors"][0].update(shape=[-1, 3])), "metadata field 'tensors.0.shape.0'"),
        (edited(lambda index: index["tensors"][0].update(shape=[3, 3])), r"expected F32 \(3, 3\), got"),
        (edited(lambda index: index["tensors"][1].update(names=[WORDS])), "names a tensor twice"),
        (edited(lambda index: index["tensors"][0].update(names=["other"])), "holds 'bert.emb.*', which the index does not know"),
        (edited(lambda index: index["tensors"].pop(0)), "holds 'bert.emb.*', which the index does not know|is not"),
        (view(offset=64 * 32 - 3), "takes 'v' from beyond"),
        (view(strides=[10**9]), "takes 'v' from beyond"),
        (view(strides=[-1]), "metadata field 'views.0.strides.0'"),
        (view(strides=[2**41]), "metadata field 'views.0.strides.0': Input should be less than"),
        (view(shape=[1] * 9), "metadata field 'views.0.shape': Tuple should have at most 8 items"),
        (edited(lambda index: index["tensors"][0].update(shape=[2**40] * 4)), "expected F32"),
        (view(name="n" * 513), "metadata field 'views.0.name': String should have at most 512 characters"),
        (view(source="none"), "takes 'v' from beyond 'none'"),
        (view(strides=[1, 1]), "takes 'v' from beyond"),
        (lambda folder: first_shard(folder).write_bytes(b"broken"), "is not a whole safetensors file"),
        (with_tensors(lambda tensors: tensors.update({WORDS: tensors[WORDS].double()})), r"got \('F64'"),
        (with_tensors(lambda tensors: tensors.update(more=torch.ones(1))), "holds 'more', which the index does not know"),
    ],
)  # fmt: skip
def test_what_is_not_a_sidecar_is_one_error(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(SidecarError, match=message):
        read_diagonal(folder)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_values_that_cannot_be_are_an_error_when_they_are_needed(folder: Path, bad: float) -> None:
    with_tensors(lambda tensors: tensors[WORDS][3].fill_(bad))(folder)
    (record,) = (one for one in read_diagonal(folder).metadata.tensors if one.names == (WORDS,))
    values = load_file(folder / record.shard)[WORDS]
    edited(lambda index: index["tensors"][0].update(sha256=digest([values])))(folder)
    sidecar = read_diagonal(folder)
    with pytest.raises(SidecarError, match=f"{WORDS} has values that are negative or not finite"):
        sidecar.fisher(sidecar.records[WORDS])


@pytest.mark.parametrize(("shape", "offset", "strides"), [
    ((32, 64), 0, (1, 32)),
    ((5, 32), 7 * 32, (32, 1)),
    ((4, 16, 8), 3, (512, 32, 2)),
    ((6,), 40, (0,)),
])  # fmt: skip
def test_blocks_of_a_view_are_those_of_the_parameter(
    folder: Path, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
) -> None:
    count = torch.Size(shape).numel()
    view(shape=shape, offset=offset, strides=strides, values=[0.0] * min(16, count))(folder)
    sidecar = read_diagonal(folder)
    wanted = made_up(tiny.classifier("bert"))[WORDS].as_strided(shape, strides, offset)
    got = torch.zeros(shape)
    for index in blocks(shape, 50):
        got[index] = sidecar.fisher(sidecar.records["v"], index)
    assert_close(got, wanted, rtol=0, atol=0)


def test_a_shard_that_was_cut_short_since_is_an_error(folder: Path) -> None:
    sidecar = read_diagonal(folder)
    record = sidecar.metadata.tensors[0]
    sidecar.fisher(record)
    shard = folder / record.shard
    content = shard.read_bytes()
    shard.write_bytes(content[: 8 + int.from_bytes(content[:8], "little") + 4])
    with pytest.raises(SidecarError, match=f"{shard.name} is not a whole safetensors file: mmap length"):
        sidecar.fisher(record)


def test_one_that_is_replaced_meanwhile_is_read_to_its_end(folder: Path) -> None:
    sidecar = read_diagonal(folder)
    record = sidecar.records[WEIGHT]
    before = sidecar.fisher(record, (slice(0, 2),)).clone()
    whole = sidecar.fisher(record).clone()
    write_for(tiny.classifier("bert"), folder, made_up(tiny.classifier("bert"), scale=2.0))
    assert_close(sidecar.fisher(record), whole, rtol=0, atol=0)
    assert_close(whole[:2], before, rtol=0, atol=0)
    anew = read_diagonal(folder)
    assert_close(anew.fisher(anew.records[WEIGHT]), 2 * whole)


def test_a_copy_elsewhere_works_and_so_do_links(folder: Path, tmp_path: Path) -> None:
    """As the hub's cache has its files."""
    copied = shutil.copytree(folder, tmp_path / "blobs")
    links = tmp_path / "links"
    links.mkdir()
    for file in copied.iterdir():
        (links / file.name).symlink_to(file)
    sidecar = read_diagonal(links)
    assert_close(sidecar.fisher(sidecar.records[WORDS]), made_up(tiny.classifier("bert"))[WORDS])
