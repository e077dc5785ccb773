"""The sidecar of rows and columns: what is written is read back, and nothing else is accepted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit.blocks import blocks
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.factored_sidecar import (
    FactoredMetadata,
    FactoredRecord,
    FactoredSidecar,
    is_factored,
    read_factored,
    write_factored,
)
from fisher_mask_mergekit.factors import Split
from fisher_mask_mergekit.marginals import row_axes
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import FACTORED_KEY, may_replace, read
from tests import tiny
from tests.test_diagonal_sidecar import made_up
from tests.test_sidecar import metadata_for

WEIGHT = "bert.encoder.layer.0.output.dense.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


def packed(value: Tensor, axis: int = 0) -> Tensor:
    """Means of rows and of columns."""
    split = Split.of(value.shape, axis)
    matrices = value.double().reshape(split.groups, split.rows, split.columns)
    return torch.cat((matrices.mean(2), matrices.mean(1)), 1).float()


def rank_one(value: Tensor) -> Tensor:
    """What is made of these again."""
    if value.ndim < 2:
        return value.double()
    wide = value.double()
    return wide.mean(1, keepdim=True) * wide.mean(0, keepdim=True) / wide.mean()


def write_for(model: Any, path: Path, fisher: dict[str, Tensor], **changes: Any) -> FactoredSidecar:
    """A sidecar of made-up Fisher information for a model."""
    axes, parameters = row_axes(model), dict(model.named_parameters())
    facts = {
        name: value for name, value in metadata_for(tiny.sites_of(model)) if name not in ("sites", "settings")
    }
    total = sum(float(value.double().sum()) for value in fisher.values())
    metadata = FactoredMetadata(
        settings=FisherSettings(data="glue:sst2", kind="factored"),
        mean=total / sum(map(Tensor.numel, fisher.values())),
        others=tuple(name for name in model.state_dict() if name not in parameters),
        tensors=tuple(
            FactoredRecord(
                names=(name,), shape=tuple(value.shape), axis=axes[name],
                values=tuple(probe(parameters[name]).double().tolist()),
            )
            for name, value in fisher.items()
        ),
        views=(),
        **facts | changes,
    )  # fmt: skip
    sidecar = FactoredSidecar(metadata, {name: packed(value) for name, value in fisher.items()}, str(path))
    write_factored(sidecar, path)
    return sidecar


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = tiny.classifier("bert")
    write_for(model, tmp_path / "factored.safetensors", made_up(model))
    return tmp_path / "factored.safetensors"


def test_what_is_written_is_read_back(path: Path) -> None:
    model = tiny.classifier("bert")
    wanted, sidecar = made_up(model), read_factored(path)
    assert sidecar.metadata.checkpoint == "somebody/bert-sst2"
    for name, value in model.named_parameters():
        record = sidecar.identify(name, value)
        assert record is not None
        assert_close(sidecar.packed[name], packed(wanted[name]), rtol=0, atol=0)
        assert_close(sidecar.fisher(record), rank_one(wanted[name]), rtol=1e-5, atol=1e-7)
        assert sidecar.mean_of(record) == pytest.approx(float(wanted[name].mean()), rel=1e-5)
    assert sidecar.source == str(path)
    assert path.stat().st_size < 0.7 * sum(4 * value.numel() for value in model.parameters())


def test_a_tensor_is_known_by_its_values(path: Path) -> None:
    model, sidecar = tiny.classifier("bert"), read_factored(path)
    value = model.get_parameter(WEIGHT)
    assert sidecar.identify(WEIGHT.replace("layer.0", "layer.1"), value) == sidecar.records[WEIGHT]
    with pytest.raises(SidecarMismatchError, match="was measured on 'somebody/bert-sst2'"):
        sidecar.identify(WEIGHT, value * 1.01)
    with pytest.raises(SidecarMismatchError, match=r"it knows no tensor 'bert\.other\.weight'"):
        sidecar.identify("bert.other.weight", value)


def test_each_kind_is_told_from_the_other(path: Path, tmp_path: Path) -> None:
    assert is_factored(path)
    assert may_replace(path)
    with pytest.raises(
        SidecarError, match="is a sidecar of rows and columns, which fisher_mask takes with nodes: all"
    ):
        read(path)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert not is_factored(tmp_path / "other.safetensors")
    assert not is_factored(tmp_path / "none")
    with pytest.raises(SidecarError, match="is not a sidecar of rows and columns"):
        read_factored(tmp_path / "other.safetensors")


def edited(
    change: Callable[[dict[str, Any]], Any] = lambda metadata: None,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Callable[[Path], None]:
    """What a forger would write: changed, and sealed anew."""

    def edit(path: Path) -> None:
        found = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[FACTORED_KEY])
        del metadata["checksum"]
        change(metadata)
        tensors(found)
        save_file(found, path, {FACTORED_KEY: seal(json.dumps(metadata), found)})

    return edit


def view(**fields: Any) -> Callable[[Path], None]:
    record = {"name": "v", "source": WORDS, "shape": [4], "offset": 0, "strides": [1], "values": [0.0] * 4}
    return edited(lambda metadata: metadata["views"].append(record | fields))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "cannot read sidecar .*: No such file"),
        (lambda path: path.write_bytes(b"broken"), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not a whole safetensors file"),
        (flip_a_bit, "is damaged: its checksum is of something else"),
        (edited(lambda metadata: metadata.update(format_version=2)), "has format version 2, this program reads 1"),
        (edited(lambda metadata: metadata.update(more=1)), "metadata field 'more': Extra inputs"),
        (edited(lambda metadata: metadata.update(mean=-1.0)), "metadata field 'mean'"),
        (edited(lambda metadata: metadata["tensors"][0].update(axis=1)), r"expected \(64, 33\), got"),
        (edited(lambda metadata: metadata["tensors"][0].update(axis=2)), r"\[64, 32\] has no axis 2"),
        (edited(lambda metadata: metadata["tensors"][0].update(axis=8)), "metadata field 'tensors.0.axis'"),
        (edited(lambda metadata: metadata["tensors"][0].update(axis=-1)), "metadata field 'tensors.0.axis'"),
        (edited(lambda metadata: metadata["tensors"][0].update(shape=[2**40] * 4)), r"tensor 'bert\S+': expected"),
        (edited(lambda metadata: metadata["tensors"][0].update(shape=[0, 0])), r"tensor 'bert\S+': expected"),
        (edited(lambda metadata: metadata["tensors"][1].update(names=[WORDS])), "names a tensor twice"),
        (edited(lambda metadata: metadata["tensors"].pop(0)), f"tensor '{WORDS}': expected no such tensor, got"),
        (edited(tensors=lambda tensors: tensors.pop(WORDS)), f"tensor '{WORDS}': expected .*, got no such tensor"),
        (edited(tensors=lambda tensors: tensors.update(more=torch.ones(1))), "tensor 'more': expected no such tensor"),
        (edited(tensors=lambda tensors: tensors.update({WORDS: tensors[WORDS].double()})), "expected float32, got torch.float64"),
        (edited(tensors=lambda tensors: tensors[WORDS][0, 3].fill_(-1.0)), f"{WORDS} has values that are negative"),
        (edited(tensors=lambda tensors: tensors[WORDS][0, 3].fill_(torch.inf)), f"{WORDS} has values that are negative"),
        (view(offset=64 * 32 - 3), "takes 'v' from beyond"),
        (view(strides=[10**9]), "takes 'v' from beyond"),
        (view(strides=[-1]), "metadata field 'views.0.strides.0'"),
        (view(shape=[0], values=[]), "takes 'v' from beyond"),
        (view(shape=[2**40] * 2, strides=[0, 0], values=[0.0] * 16), "'v' has more than 1,099,511,627,776 elements"),
        (view(offset=30), r"a piece of 'bert\S+' \[4\] is no product of its rows and columns"),
        (view(shape=[40]), "is no product of its rows and columns"),
    ],
)  # fmt: skip
def test_what_is_not_a_sidecar_is_one_error(path: Path, change: Callable[[Path], None], message: str) -> None:
    change(path)
    with pytest.raises(SidecarError, match=message):
        read_factored(path)


@pytest.mark.parametrize(("shape", "offset", "strides"), [
    ((32, 64), 0, (1, 32)),
    ((5, 32), 7 * 32, (32, 1)),
    ((4, 16, 8), 3, (512, 32, 2)),
    ((6,), 40, (0,)),
    ((31,), 1, (33,)),
    ((), 70, ()),
])  # fmt: skip
def test_blocks_of_a_piece_are_those_of_the_parameter(
    path: Path, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
) -> None:
    count = torch.Size(shape).numel()
    view(shape=shape, offset=offset, strides=strides, values=[0.0] * min(16, count))(path)
    sidecar = read_factored(path)
    wanted = rank_one(made_up(tiny.classifier("bert"))[WORDS]).contiguous().as_strided(shape, strides, offset)
    got = torch.zeros(shape, dtype=torch.float64)
    for index in blocks(shape, 50):
        got[index] = sidecar.fisher(sidecar.records["v"], index)
    assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "offset", "strides"), [
    ((4, 5), 20, (5, 1)),  # An expert.
    ((3, 5, 4), 0, (20, 1, 5)),  # All of them, transposed.
    ((3, 2, 5), 10, (20, 5, 1)),  # Of every one, half of the rows.
])  # fmt: skip
def test_experts_have_rows_and_columns_of_their_own(
    path: Path, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    fisher = torch.rand(3, 4, 5)

    def add(metadata: dict[str, Any]) -> None:
        metadata["tensors"].append({"names": ["e"], "shape": [3, 4, 5], "axis": 1, "values": [0.0] * 16})
        piece = {"name": "v", "source": "e", "values": [0.0] * 16}
        metadata["views"].append(piece | {"shape": shape, "offset": offset, "strides": strides})

    edited(add, lambda tensors: tensors.update(e=packed(fisher, 1)))(path)
    sidecar = read_factored(path)
    wanted = torch.stack([rank_one(matrix) for matrix in fisher])
    assert_close(sidecar.fisher(sidecar.records["e"]), wanted, rtol=1e-5, atol=1e-7)
    got = sidecar.fisher(sidecar.records["v"])
    assert_close(got, wanted.contiguous().as_strided(shape, strides, offset), rtol=1e-5, atol=1e-7)


def test_it_cannot_be_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SidecarError, match=r"cannot write .*; nothing was written"):
        write_factored(read_factored(path), tmp_path / "file" / "factored.safetensors")
