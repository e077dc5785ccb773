"""The ways to write a merge, and mergekit's options: each against equation 5 by hand."""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click.testing
import mergekit.multigpu_executor
import pytest
import torch
import yaml
from mergekit.merge_methods.base import TensorEntry, TensorGroup, TensorMetadata
from mergekit.scripts import run_yaml
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit.method import fisher_mask
from fisher_mask_mergekit.sites import GovernedTensor, Node, Site, row_fisher
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.weighting import Scheme, Unmasked
from tests import tiny
from tests.families import FAMILIES, build, sibling
from tests.test_architectures import write_checkpoint
from tests.test_end_to_end import quickly, weights_of

LAYERS = 4
Source = tuple[int, str, float]
"""Which model, which of its tensors, and its weight."""


@dataclass
class Made:
    """Checkpoints of one parent, with sidecars of made-up Fisher information."""

    work: Path
    folders: list[Path]
    states: list[dict[str, Tensor]]
    fishers: list[dict[str, dict[Node, Tensor]]]
    governed: dict[str, tuple[Site, GovernedTensor]]

    def write(self, **recipe: Any) -> Path:
        path = self.work / "recipe.yml"
        path.write_text(yaml.safe_dump({"merge_method": "fisher_mask", "base_model": self.name(0)} | recipe))
        return path

    def name(self, index: int) -> str:
        return str(self.folders[index])

    def models(self, *weights: Any) -> list[dict[str, Any]]:
        return [
            {"model": self.name(index), "parameters": {"weight": weight}}
            for index, weight in enumerate(weights)
        ]

    def merge(self, *options: str | Path, out: str = "merged", **recipe: Any) -> dict[str, Tensor]:
        quickly("mergekit-yaml", self.write(**recipe), self.work / out, "--no-write-model-card", *options)
        return weights_of(self.work / out)

    def by_hand(self, sources: Sequence[Source]) -> Tensor:
        top: Any = 0
        bottom: Any = 0
        for model, name, weight in sources:
            fisher = torch.ones(1)
            if name in self.governed:
                site, tensor = self.governed[name]
                fisher = row_fisher(site, tensor, self.fishers[model][site.output], torch.ones(1))
            top = top + weight * fisher.double() * self.states[model][name].double()
            bottom = bottom + weight * fisher.double()
        return top / bottom

    def check(
        self, merged: Mapping[str, Tensor], weights: Sequence[float], rtol: float = 1e-5, atol: float = 1e-6
    ) -> None:
        for name, value in merged.items():
            wanted = self.by_hand([(index, name, weight) for index, weight in enumerate(weights)])
            assert_close(value.double(), wanted, rtol=rtol, atol=atol)


def make(work: Path, parent: Any, count: int = 2, **options: Any) -> Made:
    models = [sibling(parent, seed) for seed in range(count)]
    folders = [work / f"model{index}" for index in range(count)]
    fishers = [
        write_checkpoint(model, folder, seed, **options)
        for seed, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]
    states = [dict(model.state_dict()) for model in models]
    sites = sites_of(parent, {name: tuple(value.shape) for name, value in states[0].items()})
    found = [Scheme().of((site, tensor)) for site in sites for tensor in site.tensors]
    governed = {one[1].name: one for one in found if one is not None and one[1].layout != "mean"}
    return Made(work, folders, states, fishers, governed)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path, tiny.classifier("llama", num_hidden_layers=LAYERS))


def layer(name: str, number: int) -> str:
    return name.replace("layers.0.", f"layers.{number}.")


def test_slices_with_shifted_repeated_and_dropped_layers(made: Made) -> None:
    def part(first: int, second: int, length: int = 1) -> dict[str, Any]:
        ranges = ([first, first + length], [second, second + length])
        return {
            "sources": [
                {"model": made.name(index), "layer_range": span, "parameters": {"weight": 1.0}}
                for index, span in enumerate(ranges)
            ]
        }

    merged = made.merge(slices=[part(0, 1, 2), part(0, 3)])
    assert max(int(name.split(".")[2]) for name in merged if ".layers." in name) == 2
    for name in [name for name in merged if "layers.0." in name]:
        for output, (first, second) in enumerate(((0, 1), (1, 2), (0, 3))):
            wanted = made.by_hand([(0, layer(name, first), 1.0), (1, layer(name, second), 1.0)])
            assert_close(merged[layer(name, output)].double(), wanted, rtol=1e-5, atol=1e-6)


def test_weights_that_are_gradients_over_layers_and_filters(made: Made) -> None:
    merged = made.merge(
        models=made.models([0.2, 0.8], [{"filter": "self_attn", "value": 0.25}, {"value": 1.0}])
    )
    for name in [name for name in merged if "layers.0." in name]:
        for number in range(LAYERS):
            first = 0.2 + 0.6 * number / (LAYERS - 1)
            second = 0.25 if "self_attn" in name else 1.0
            wanted = made.by_hand([(0, layer(name, number), first), (1, layer(name, number), second)])
            assert_close(merged[layer(name, number)].double(), wanted, rtol=1e-5, atol=1e-6)


def test_modules_of_a_multimodal_model(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "mistral3")
    made = make(tmp_path, build(family))
    options = "--no-copy-tokenizer"
    plain = made.merge(options, models=made.models(1.0, 1.0))
    halves = {
        "text_decoder": {"models": made.models(1.0, 1.0)},
        "multi_modal_projector": {"models": made.models(1.0, 0.0)},
        "vision_tower": {"models": made.models(1.0, 3.0)},
    }
    merged = made.merge(options, out="by-module", modules=halves)
    assert merged.keys() == plain.keys()
    first, thirds = (
        weights_of(made.folders[0]),
        made.merge(options, out="thirds", models=made.models(1.0, 3.0)),
    )
    for name, value in merged.items():
        kind = name.split(".")[0]
        wanted = {"multi_modal_projector": first, "vision_tower": thirds}.get(kind, plain)
        assert_close(value, wanted[name], rtol=0, atol=0)
    towers = [name for name in merged if name.startswith("vision_tower") and "q_proj" in name]
    assert towers
    assert not any(torch.equal(merged[name], plain[name]) for name in towers)


def _as_pickle(folder: Path) -> None:
    state = weights_of(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")


def test_sharded_and_pickled_weights_merge_alike(tmp_path: Path) -> None:
    parent = tiny.classifier("llama")
    plain = make(tmp_path / "plain", parent)
    wanted = plain.merge(models=plain.models(1.0, 2.0))
    plain.check(wanted, [1.0, 2.0])
    sharded = make(tmp_path / "sharded", parent, max_shard_size="20KB")
    assert len(list(sharded.folders[0].glob("model-*.safetensors"))) > 2
    assert_close(sharded.merge(models=sharded.models(1.0, 2.0)), wanted, rtol=0, atol=0)
    pickled = make(tmp_path / "pickled", parent)
    for folder in pickled.folders:
        _as_pickle(folder)
    for number, options in enumerate(([], ["--lazy-unpickle"])):
        merged = pickled.merge(*options, out=f"out{number}", models=pickled.models(1.0, 2.0))
        assert_close(merged, wanted, rtol=0, atol=0)


def test_the_scheme_may_differ_between_tensors(made: Made) -> None:
    """As mergekit's filters have it."""
    nodes = [{"filter": "layers.1.", "value": "columns"}, {"value": "paper"}]
    values = [{"filter": "layers.2.", "value": True}, {"value": False}]
    parameters = {"nodes": nodes, "values": values}
    merged = made.merge(models=made.models(1.0, 1.0), parameters=parameters)
    plain = made.merge(models=made.models(1.0, 1.0), out="plain")
    moved = {name for name, value in merged.items() if not torch.equal(value, plain[name])}
    assert moved == {
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    }


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "llama-tied")
    made = make(tmp_path, build(family))
    merged = made.merge("--no-copy-tokenizer", models=made.models(1.0, 1.0))
    assert "lm_head.weight" not in merged
    made.check(merged, [1.0, 1.0])


@pytest.mark.parametrize("out_dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_and_out_dtype(made: Made, dtype: str, out_dtype: str | None) -> None:
    recipe = {"dtype": dtype} | ({"out_dtype": out_dtype} if out_dtype else {})
    merged = made.merge(models=made.models(1.0, 1.0), **recipe)
    written = getattr(torch, out_dtype or dtype)
    made.states = [
        {name: value.to(getattr(torch, dtype)) for name, value in state.items()} for state in made.states
    ]
    assert {value.dtype for value in merged.values()} == {written}
    eps = max(torch.finfo(written).eps, torch.finfo(getattr(torch, dtype)).eps)
    made.check(merged, [1.0, 1.0], rtol=2 * eps, atol=eps / 10)


def test_writing_in_the_background(made: Made) -> None:
    wanted = made.merge(models=made.models(1.0, 1.0))
    merged = made.merge("--async-write", "--write-threads", "2", out="again", models=made.models(1.0, 1.0))
    assert_close(merged, wanted, rtol=0, atol=0)


def test_the_executor_for_many_gpus(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads and its division of labour, with two processors in place of the GPUs."""
    wanted = made.merge(models=made.models(1.0, 1.0))
    executor = mergekit.multigpu_executor
    monkeypatch.setattr(executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(executor, "get_torch_accelerator_count", lambda: 2)
    monkeypatch.setattr(torch.cpu, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    merged = made.merge("--multi-gpu", out="again", models=made.models(1.0, 1.0))
    assert_close(merged, wanted, rtol=0, atol=0)


def test_where_new_tensors_go_by_default_does_not_matter(made: Made) -> None:
    """In that executor, torch makes new tensors on the thread's GPU."""
    name = "model.layers.0.self_attn.q_proj.weight"
    sidecars = [str(folder / "fisher" / "mask_fisher.safetensors") for folder in made.folders]
    group = TensorGroup(
        entries=tuple(TensorEntry(id=i, tensor=state[name]) for i, state in enumerate(made.states)),
        metadata=TensorMetadata(name=name),
    )
    unmasked: Unmasked
    for unmasked in ("average", "universal"):
        parameters = {"weight": {0: 1.0, 1: 1.0}, "sidecar": dict(enumerate(sidecars)), "missing": "error"}
        scheme = Scheme("columns", values=True, normalize="tensor", unmasked=unmasked)
        with torch.device("meta"):
            merged = fisher_mask.merge_group(group, **parameters, **asdict(scheme))
        assert merged.device.type == "cpu"
        assert merged.isfinite().all()


@pytest.mark.parametrize("count", [3, 8])
def test_the_order_of_many_models_changes_no_bit(tmp_path: Path, count: int) -> None:
    made = make(tmp_path, tiny.classifier("bert"), count)
    weights = [1.0 + 0.1 * index for index in range(count)]
    models = made.models(*weights)
    wanted = made.merge(models=models)
    made.check(wanted, weights)
    orders = list(itertools.permutations(range(count)))
    for number, order in enumerate((orders[-1], orders[len(orders) // 2])):
        merged = made.merge(out=f"out{number}", models=[models[index] for index in order])
        assert_close(merged, wanted, rtol=0, atol=0)


def test_different_vocabularies_with_a_tokenizer_section(tmp_path: Path) -> None:
    made = make(tmp_path, tiny.classifier("llama"))
    for index, (folder, extra) in enumerate(zip(made.folders, (["left"], ["right", "wide"]), strict=True)):
        model = sibling(tiny.classifier("llama"), index)
        words = tiny.tokenizer()
        words.add_tokens(extra)
        model.resize_token_embeddings(tiny.VOCABULARY + len(extra), mean_resizing=False)
        made.fishers[index] = write_checkpoint(model, folder, index)
        words.save_pretrained(folder)
        made.states[index] = dict(model.state_dict())
    merged = made.merge(models=made.models(1.0, 3.0), tokenizer={"source": "union"})
    embedding = merged.pop("model.embed_tokens.weight")
    made.check(merged, [1.0, 3.0])
    one, two = (state["model.embed_tokens.weight"] for state in made.states)
    shared = tiny.VOCABULARY
    assert_close(embedding[:shared], (one[:shared] + 3 * two[:shared]) / 4)
    rows = {tuple(row.tolist()) for row in embedding[shared:]}
    assert rows == {tuple(row.tolist()) for row in (one[shared], two[shared], two[shared + 1])}


def test_a_site_whose_shape_differs_is_named(tmp_path: Path) -> None:
    narrow, wide = (
        make(tmp_path / "narrow", tiny.classifier("bert")),
        tiny.classifier("bert", intermediate_size=64),
    )
    write_checkpoint(wide, narrow.folders[1], 1)
    recipe = str(narrow.write(models=narrow.models(1.0, 1.0)))
    result = click.testing.CliRunner().invoke(run_yaml.main, [recipe, str(tmp_path / "out")])
    assert re.search(r"size mismatch for bert\.encoder\.layer\.\d\.(inter|out)", str(result.exception))
