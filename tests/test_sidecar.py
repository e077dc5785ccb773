"""The sidecar: what is written is read back, and nothing else is accepted."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fisher_mask_mergekit import store
from fisher_mask_mergekit.errors import SidecarError, SidecarMismatchError
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.seal import seal
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import (
    METADATA_KEY,
    DataRecord,
    Metadata,
    Sidecar,
    may_replace,
    read,
    write,
)
from fisher_mask_mergekit.sites import Site
from tests import tiny


def metadata_for(sites: tuple[Site, ...], **changes: Any) -> Metadata:
    fields: dict[str, Any] = {
        "format_version": 1,
        "checkpoint": "somebody/bert-sst2",
        "revision": "95f0f6f859b35c8ff0863ae3cd4e2dbc702c0ae2",
        "task": "sequence-classification",
        "truncated": 0,
        "architecture": "BertForSequenceClassification",
        "weights": "00",
        "settings": FisherSettings(data="glue:sst2"),
        "data": DataRecord(
            split="train",
            revision=None,
            text=("text",),
            label="label",
            label_map={"0": 0},
            rows=9,
            digest="00",
            majority=0.5,
        ),
        "samples": 9,
        "max_length": 40,
        "accuracy": 0.5,
        "loss": 0.7,
        "versions": {"torch": "2"},
        "device": "cpu",
        "date": "2026-01-01T00:00:00+00:00",
        "sites": sites,
    }
    return Metadata(**fields | changes)


def sidecar_for(model: Any, scale: float = 1.0, seed: int = 0) -> Sidecar:
    """A sidecar with made-up Fisher information for a model."""
    sites = tiny.sites_of(model)
    generator = torch.Generator().manual_seed(seed)
    fisher: dict[str, Any] = {
        site.output: {
            node: scale * torch.rand(length, generator=generator) for node, length in site.nodes().items()
        }
        for site in sites
    }
    state = model.state_dict()
    values = {tensor.name: probe(state[tensor.name]) for site in sites for tensor in site.tensors}
    return Sidecar(metadata_for(sites), fisher, values, "made up")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "fisher" / "mask_fisher.safetensors"
    write(sidecar_for(tiny.classifier("llama")), file)
    return file


def test_round_trip(path: Path) -> None:
    wanted = sidecar_for(tiny.classifier("llama"))
    got = read(path)
    assert got.metadata == wanted.metadata
    assert_close({k: dict(v) for k, v in got.fisher.items()}, {k: dict(v) for k, v in wanted.fisher.items()})
    for name, values in wanted.values.items():
        assert_close(got.values[name][: len(values)], values, rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_is_an_ordinary_safetensors_file_with_the_documented_names(path: Path) -> None:
    tensors = load_file(path)
    assert tensors["model.layers.0.self_attn.o_proj.head_fisher"].shape == (4,)
    assert tensors["model.layers.0.self_attn.o_proj.kv_head_fisher"].shape == (2,)
    assert tensors["model.layers.1.mlp.down_proj.neuron_fisher"].shape == (48,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_checkpoint_is_recognised_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny.classifier("bert")
    sidecar = sidecar_for(model)
    for name, tensor in model.state_dict().items():
        found = sidecar.identify(name, tensor.to(dtype))
        assert (found is not None) == (name in sidecar.governed)
        assert found is None or found[1].name == name


def test_a_moved_layer_is_recognised_by_its_values() -> None:
    model = tiny.classifier("bert")
    sidecar = sidecar_for(model)
    moved = model.state_dict()["bert.encoder.layer.0.attention.self.key.weight"]
    for index in (1, 7):
        found = sidecar.identify(f"bert.encoder.layer.{index}.attention.self.key.weight", moved)
        assert found is not None
        assert found[1].name == "bert.encoder.layer.0.attention.self.key.weight"


def test_another_checkpoint_or_a_changed_one_is_refused() -> None:
    model = tiny.classifier("bert")
    sidecar = sidecar_for(model)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with pytest.raises(
        SidecarMismatchError, match=rf"bert-sst2' \(revision 95f0f6f\): tensor '{name}' has other values"
    ):
        sidecar.identify(name, tiny.classifier("bert", seed=1).state_dict()[name])
    with pytest.raises(SidecarMismatchError, match=r"layer\.7\.inter.* has other values"):
        sidecar.identify(name.replace("layer.0", "layer.7"), torch.zeros(48, 32))
    with pytest.raises(SidecarMismatchError, match="has other values"):
        sidecar.identify(name, torch.zeros(5, 32))


def test_a_moved_tensor_that_fits_several_layers_is_refused() -> None:
    model = tiny.classifier("bert")
    state = model.state_dict()
    for index in (0, 1):
        state[f"bert.encoder.layer.{index}.attention.self.key.bias"].zero_()
    sidecar = sidecar_for(model)
    with pytest.raises(SidecarMismatchError, match="fits several layers"):
        sidecar.identify("bert.encoder.layer.5.attention.self.key.bias", torch.zeros(32))


def test_probed_values_come_from_many_rows_and_columns() -> None:
    tensor = torch.arange(768 * 768, dtype=torch.float64).reshape(768, 768)
    positions = probe(tensor).long()
    assert len(set((positions // 768).tolist())) > 12
    assert len(set((positions % 768).tolist())) > 12
    assert_close(probe(torch.arange(5.0)).sort().values, torch.arange(5.0))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"][METADATA_KEY])
    del metadata["checksum"]
    change(tensors, metadata)
    save_file(tensors, path, {METADATA_KEY: seal(json.dumps(metadata), tensors)})


HEAD = "model.layers.0.self_attn.o_proj.head_fisher"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], str]] = {
    "a later format": (
        lambda t, m: m.update(format_version=2),
        "format version 2, this program reads 1; upgrade",
    ),
    "an extra field": (lambda t, m: m.update(colour="red"), "field 'colour': Extra inputs are not permitted"),
    "a missing field": (lambda t, m: m.pop("samples"), "field 'samples': Field required"),
    "a missing limit": (lambda t, m: m.pop("max_length"), "field 'max_length': Field required"),
    "missing rows": (lambda t, m: m["data"].pop("rows"), "field 'data.rows': Field required"),
    "a wrong setting": (lambda t, m: m["settings"].update(labels="any"), "field 'settings.labels'"),
    "a negative value": (lambda t, m: t[HEAD].fill_(-1), f"{HEAD} has values that are negative"),
    "a value that is not finite": (lambda t, m: t[HEAD].fill_(torch.inf), "negative or not finite"),
    "a missing tensor": (lambda t, m: t.pop(HEAD), f"'{HEAD}': expected \\(4,\\), got no such tensor"),
    "an unknown tensor": (lambda t, m: t.update(extra=torch.ones(1)), "'extra': expected no such tensor"),
    "a wrong shape": (lambda t, m: t.update({HEAD: torch.ones(5)}), r"expected \(4,\), got \(5,\)"),
    "a wide dtype": (
        lambda t, m: t.update({HEAD: torch.ones(4).double()}),
        "expected float32, got torch.float64",
    ),
    "a wrong dtype": (
        lambda t, m: t.update({HEAD: torch.ones(4).half()}),
        "expected float32, got torch.float16",
    ),
    "a tensor twice": (lambda t, m: m["sites"].append(m["sites"][0]), "names a site or a tensor twice"),
    "a site of two kinds": (
        lambda t, m: m["sites"][0].update(neurons=4),
        "an FFN site, and no other, has neurons",
    ),
    "heads that do not divide": (lambda t, m: m["sites"][0].update(kv_heads=3), "kv_heads must divide heads"),
    "rows of another kind": (
        lambda t, m: m["sites"][0]["tensors"][0].update(layout="n"),
        "does not divide among",
    ),
    "a query's rows as values": (
        lambda t, m: m["sites"][0]["tensors"][0].update(layout="v"),
        "q_proj.weight' does not divide among",
    ),
    "value rows of another number": (
        lambda t, m: m["sites"][0]["tensors"][2].update(shape=[24, 32]),
        "v_proj.weight' does not divide among",
    ),
    "columns along the rows": (
        lambda t, m: m["sites"][1]["tensors"][2].update(axis=0),
        "down_proj.weight' does not divide among",
    ),
    "columns of another number": (
        lambda t, m: m["sites"][0]["tensors"][3].update(shape=[32, 64]),
        "o_proj.weight' does not divide among",
    ),
    "columns of the other kind of site": (
        lambda t, m: m["sites"][1]["tensors"][2].update(layout="columns h"),
        "down_proj.weight' does not divide among",
    ),
    "columns of a vector": (
        lambda t, m: m["sites"][1]["tensors"][2].update(shape=[48], axis=0),
        "down_proj.weight' does not divide among",
    ),
    "no columns": (
        lambda t, m: m["sites"][1]["tensors"][2].update(layout="mean"),
        "no tensor has the output projection's columns; measure the checkpoint again",
    ),
    "an expert where there are none": (
        lambda t, m: m["sites"][1]["tensors"][0].update(expert=0),
        "does not divide among the site's nodes",
    ),
    "a shape that no tensor has": (
        lambda t, m: m["sites"][1]["tensors"][0].update(shape=[10**400, 32]),
        "metadata field 'sites.1.tensors.0.shape.0'|metadata field 'sites'|Input should be",
    ),
    "a loss that is no number": (lambda t, m: m.update(loss=float("nan")), "field 'loss'"),
    "more heads than there can be": (
        lambda t, m: m["sites"][0].update(heads=2**41),
        "'sites.0.heads': Input should be less than or equal to 1099511627776",
    ),
    "a name that is too long": (
        lambda t, m: m["sites"][0].update(output="n" * 513),
        "'sites.0.output': String should have at most 512 characters",
    ),
    "a text that is too long": (
        lambda t, m: m.update(device="d" * 8193),
        "field 'device': String should have at most 8192 characters",
    ),
    "more samples asked for than can be": (
        lambda t, m: m["settings"].update(samples=2**40 + 1),
        "field 'settings.samples': Input should be less than or equal",
    ),
    "more samples than rows": (lambda t, m: m.update(samples=10), "no more samples than rows"),
    "more truncated than samples": (lambda t, m: m.update(truncated=10), "no more truncated than samples"),
    "rows that do not divide": (
        lambda t, m: m["sites"][0]["tensors"][0].update(shape=[33, 32]),
        "does not divide among the site's nodes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_inconsistent_file_is_refused(path: Path, case: str) -> None:
    change, message = BROKEN[case]
    _rewrite(path, change)
    with pytest.raises(SidecarError, match=message):
        read(path)


def test_a_truncated_file_is_refused_wherever_it_is_cut(path: Path) -> None:
    content = path.read_bytes()
    for length in [0, 3, 8, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(SidecarError, match="not a whole safetensors file"):
            read(path)


def test_a_foreign_file_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(SidecarError, match="not a sidecar"):
        read(path)
    path.write_text("hello, this is not a safetensors file at all")
    with pytest.raises(SidecarError, match="not a whole safetensors file"):
        read(path)
    with pytest.raises(SidecarError, match="cannot read sidecar"):
        read(path / "nowhere")


def test_a_huge_file_is_refused_unread(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate((1 << 30) + 1)
    with pytest.raises(SidecarError, match="is larger than 1073741824 bytes; that is no sidecar"):
        read(path)


def test_only_a_sidecar_may_be_replaced(path: Path, tmp_path: Path) -> None:
    assert may_replace(path)
    assert may_replace(tmp_path / "new.safetensors")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "empty").touch()
    for other in (tmp_path / "model.safetensors", tmp_path / "empty", tmp_path):
        assert not may_replace(other)


def test_no_room_on_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(SidecarError, match="No space left on device; nothing was written"):
        write(sidecar_for(tiny.classifier("llama"), seed=1), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_no_file_is_not_read() -> None:
    with pytest.raises(SidecarError, match="cannot read sidecar /dev/zero: it is no file"):
        read(Path("/dev/zero"))
