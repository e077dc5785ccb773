"""Every architecture: the map from rows to nodes, the pre-pass, and a merge through mergekit, each against a reference."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import yaml
from mergekit.scripts import run_yaml
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit.checkpoint import locate, read_tensors, tensor_shapes
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, write
from fisher_mask_mergekit.sites import GovernedTensor, Node, NodeKey, Site, row_fisher
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.store import BESIDE
from fisher_mask_mergekit.table import find_sites
from fisher_mask_mergekit.tasks import Batch, Categorical, Likelihood, SequenceClassification, task_of
from tests import tiny, tiny_tasks
from tests.families import FAMILIES, REMOTE, Fails, Family, Loses, Remote, build, inputs, sibling
from tests.families.experts import EXPERTS
from tests.families.perturbation import changed, heard
from tests.naive import naive_fisher, naive_gradients
from tests.test_sidecar import metadata_for

# What transformers computes of these in float64 is not a number: where a sample is padded; in any case.
UNPADDED, FLOAT32 = {"gemma2", "gemma2-sequence"}, {"canine"}
# A vision tower's softmax, or a router's scores, are float32 in these whatever the dtype.
FLOAT32_INSIDE = {
    "gemma3-vl", "llama4", "afmoe", "glm4-moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-dense-first",
    "deepseek-v3-moonlight",
}  # fmt: skip
# No head, and so no loss; no text to go in; only texts of certain lengths.
WITHOUT_TASK = {"bert", "roberta", "distilbert", "t5-encoder", "whisper", "bert-chunked"}
WITH_EXPERTS = [
    family
    for family in FAMILIES
    if family in EXPERTS or family.name in ("llama4", "qwen3-vl-moe")
    if family.name != "granite-hybrid-dense"
]
each = pytest.mark.parametrize("family", FAMILIES, ids=str)
PARTS: Mapping[str, Node] = {
    "queries": "head_fisher",
    "keys": "kv_head_fisher",
    "values": "kv_head_fisher",
    "neurons": "neuron_fisher",
}
"""Kinds of rows, and the node that each is of."""


class Anything(SequenceClassification):
    """A loss for whatever a model puts out: the mean over positions of its first output, as scores of classes.

    Padding is no position, and no class where positions are classes.
    """

    def likelihood(self, model: Any, batch: Batch) -> Likelihood:
        given = {
            name: value.to(next(model.parameters()).dtype) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        output = model(**given)[0]
        positions = output.reshape(len(batch.index), -1, output.shape[-1])
        mask = batch.inputs.get("attention_mask")
        kept = torch.ones_like(positions[..., :1])
        if mask is not None and mask.shape == output.shape[:-1]:
            kept = mask.reshape(kept.shape).to(kept.dtype)
        scores = (positions * kept).sum(1) / kept.sum(1)
        if mask is not None and mask.shape == output.shape:
            scores = scores.masked_fill(mask == 0, -torch.inf)
        log_probs = torch.log_softmax(scores, -1)
        owner = torch.arange(len(batch.index))
        ones = torch.ones(len(owner), dtype=log_probs.dtype)
        return Categorical(log_probs, batch.labels, owner, ones, batch.index)


TASK = Anything()


def model_of(family: Family) -> tuple[Any, tuple[Site, ...]]:
    """The family's model and its sites. The tests leave it as it is."""
    return _model_of(family.name)


@lru_cache(maxsize=1)
def _model_of(name: str) -> tuple[Any, tuple[Site, ...]]:
    model = build(next(family for family in FAMILIES if family.name == name))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return model, sites_of(model, shapes)


def batches(family: Family, sizes: tuple[int, ...]) -> Iterator[Batch]:
    first = 0
    for size in sizes:
        index = tuple(range(first, first + size))
        yield Batch(inputs(family, size, first=first), torch.tensor([i % 2 for i in index]), index)
        first += size


def rows_of(site: Site, tensor: GovernedTensor, part: str, index: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The positions along a tensor's rows (experts and rows) that one node governs."""
    one_hot: dict[Node, Tensor] = {kind: torch.zeros(shape) for kind, shape in site.nodes().items()}
    values = torch.zeros(max(site.kv_heads, 1))
    (values if part == "values" else one_hot[PARTS[part]])[index] = 1
    return [tuple(place) for place in row_fisher(site, tensor, one_hot, values).nonzero().tolist()]


def columns_of(site: Site, node: Node, index: int) -> list[int]:
    """The columns of the output projection's input that a node multiplies."""
    if node == "neuron_fisher":
        return [index]
    width = site.head_dim * (site.heads // site.kv_heads if node == "kv_head_fisher" else 1)
    return list(range(index * width, (index + 1) * width))


def governed(model: Any, site: Site) -> Iterator[tuple[GovernedTensor, str, int]]:
    """Tensors of the loaded model, and for each kind of rows that one has, how many nodes there are."""
    for tensor in loaded(model, site):
        if not tensor.layout.startswith("columns"):
            for part, node in PARTS.items():
                shape = site.nodes().get(node)
                if shape and rows_of(site, tensor, part, (0,) * len(shape)):
                    yield tensor, part, shape[-1]


def loaded(model: Any, site: Site) -> list[GovernedTensor]:
    """The tensors of the loaded model that mask nodes govern."""
    parameters = dict(model.named_parameters())
    return [tensor for tensor in site.tensors if tensor.name in parameters and tensor.layout != "mean"]


@each
def test_moving_a_nodes_rows_moves_its_columns_only(family: Family) -> None:
    model, sites = model_of(family)
    batch = inputs(family)
    assert {site.kind for site in sites} == set(family.sites)
    for site in sites:
        if site.kind == "attention":
            wanted = next((h, k) for part, h, k in family.heads if part in site.output)
            assert (site.heads, site.kv_heads) == wanted, site.output
        if site.experts or ("vision" in site.output and family.inputs == "text"):
            continue
        for tensor, part, count in governed(model, site):
            for index in {1, count - 1} - {count}:
                own = columns_of(site, PARTS[part], index)
                rows = [place[tensor.axis] for place in rows_of(site, tensor, part, (index,))]
                others = [
                    place[tensor.axis]
                    for other in range(count)
                    if other != index
                    for place in rows_of(site, tensor, part, (other,))
                ]
                moved = changed(model, batch, site.output, tensor.name, rows, tensor.axis)
                rest = (
                    changed(model, batch, site.output, tensor.name, others, tensor.axis) if others else None
                )
                if not family.coupled:
                    outside = moved.clone()
                    outside[own] = False
                    assert not outside.any(), (tensor.name, part, index)
                    assert rest is None or not rest[own].any(), (tensor.name, part, index)
                # A key's bias moves all scores of a query alike, but for rotary positions.
                if not (part == "keys" and len(tensor.shape) == 1):
                    assert moved[own].any(), (tensor.name, part, index)


@pytest.mark.parametrize("family", WITH_EXPERTS, ids=str)
def test_rows_of_an_experts_muted_neuron_go_unheard(family: Family) -> None:
    model, sites = model_of(family)
    batch = inputs(family, 4)
    experts = [site for site in sites if site.experts]
    assert experts
    for site in experts:
        for tensor, _, _ in governed(model, site):
            heard_beside_another = 0
            for expert in range(site.experts):
                for place in rows_of(site, tensor, "neurons", (expert, 5)):
                    assert place[0] == expert
                    rows: list[Any] = [slice(None)] * len(tensor.shape)
                    rows[0], rows[tensor.axis] = place[0], place[tensor.axis]
                    moved = model, batch, tensor.name, tuple(rows), site.output
                    assert not heard(*moved, _column(site, expert, 5))
                    heard_beside_another += heard(*moved, _column(site, expert, 6))
            assert heard_beside_another


def _column(site: Site, expert: int, neuron: int) -> tuple[Any, ...]:
    """Where a neuron leaves its expert, in the experts' output projection ``[E, ...]``."""
    column: list[Any] = [expert, slice(None), slice(None)]
    column[3 - site.model_axis(site.output)] = neuron
    return tuple(column)


def exact_model(family: Family) -> Any:
    """The family's model in float64, or as wide as it can be."""
    model = build(family) if family.name in FLOAT32 else build(family).double()
    if any(site.experts for site in model_of(family)[1]) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # The others have no float64 on a processor.
    return model


def precision(family: Family) -> float:
    return 1e-3 if family.name in FLOAT32 else 1e-6 if family.name in FLOAT32_INSIDE else 1e-8


@pytest.mark.parametrize("placement", ["post", "pre"])
@each
def test_the_pre_pass_equals_the_definition(family: Family, placement: Any) -> None:
    sites = model_of(family)[1]
    if not sites:
        pytest.skip("no mask nodes")
    model = exact_model(family)
    if family.name in UNPADDED:
        family = replace(family, inputs="text without mask")
    singles = list(batches(family, (1,) * 5))
    # Images in patches have no batch axis.
    together = singles if family.inputs == "text and patches" else batches(family, (3, 2))
    got = mask_fisher(model, together, sites, TASK, mask_placement=placement)
    if got.one_by_one:  # Without padding, which moves what is rounded.
        singles = [single.trimmed() for single in singles]
    wanted = naive_fisher(model, TASK, singles, sites, placement)
    assert got.fisher.keys() == wanted.keys()
    allowed = precision(family)
    for key, value in wanted.items():
        assert_close(got.fisher[key], value.double(), rtol=allowed, atol=allowed * float(value.max()))
    assert any(float(value.max()) > 0 for value in wanted.values())


@each
def test_columns_and_value_rows_account_for_the_masks_gradient(family: Family) -> None:
    """What a mask multiplies is linear in them: the mask's gradient is the sum of W dl/dW over what it governs."""
    sites = model_of(family)[1]
    if not sites:
        pytest.skip("no mask nodes")
    model = exact_model(family)
    if family.name in UNPADDED:
        family = replace(family, inputs="text without mask")
    (sample,) = batches(family, (1,))
    wanted, _ = naive_gradients(model, TASK, sample, sites)
    TASK.likelihood(model, sample).losses(None).sum().backward()
    allowed = precision(family)
    for site in sites:
        own = {key: value for key, value in wanted.items() if key[0] == site.output and value.any()}
        if not own:
            continue  # No sample runs through it.
        found = accounted(model, site, columns=True)
        assert found.keys() == {(site.output, "neuron_fisher" if site.kind == "ffn" else "head_fisher")}
        with_values = any("v" in tensor.layout for tensor in loaded(model, site))
        assert with_values == (site.kind == "attention")
        if with_values:
            found |= accounted(model, site, columns=False)
            assert found.keys() == own.keys()
        for key, got in found.items():
            assert_close(got, own[key], rtol=allowed, atol=allowed * float(own[key].abs().max()))


def accounted(model: Any, site: Site, *, columns: bool) -> dict[NodeKey, Tensor]:
    """The sum of W dl/dW over each node's columns of the output projection, or over its value rows."""
    masks = {
        node: torch.zeros(shape, dtype=torch.float64, requires_grad=columns)
        for node, shape in site.nodes().items()
    }
    values = torch.zeros(max(site.kv_heads, 1), dtype=torch.float64, requires_grad=not columns)
    total: Any = 0
    for tensor in loaded(model, site):
        weight = model.get_parameter(tensor.name)
        if tensor.layout.startswith("columns") == columns and weight.grad is not None:
            total = total + (weight.detach() * weight.grad * row_fisher(site, tensor, masks, values)).sum()
    total.backward()
    found: dict[Node, Tensor] = masks if columns else {"kv_head_fisher": values}
    return {(site.output, node): mask.grad for node, mask in found.items() if mask.grad is not None}


def write_checkpoint(model: Any, folder: Path, seed: int, **options: Any) -> dict[str, dict[Node, Tensor]]:
    """A checkpoint and a sidecar of made-up Fisher information, which makes models differ more than measuring does."""
    model.save_pretrained(folder, **options)
    checkpoint = locate(str(folder))
    shapes = tensor_shapes(checkpoint)
    sites = sites_of(model, shapes)
    generator = torch.Generator().manual_seed(seed)
    fisher = {
        site.output: {node: torch.rand(shape, generator=generator) for node, shape in site.nodes().items()}
        for site in sites
    }
    names = {tensor.name for site in sites for tensor in site.tensors}
    values = {name: probe(model.get_parameter(name)) for name in names - shapes.keys()}
    values |= {name: probe(tensor) for name, tensor in read_tensors(checkpoint, names & shapes.keys())}
    write(Sidecar(metadata_for(sites), fisher, values), folder / BESIDE)
    return fisher


def compute_checkpoint(model: Any, folder: Path, seed: int) -> Mapping[str, Mapping[Node, Tensor]]:
    """A checkpoint, measured on text of its own."""
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    data = folder.with_suffix(".jsonl")
    draw = tiny_tasks.Draw(seed)
    rows = [row_for(task_of(model.config, "it", FisherSettings()).name, draw) for _ in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = prepare(str(folder), FisherSettings(data=str(data), batch_size=3))
    sidecar = compute(job, torch.device("cpu")).sidecar
    assert isinstance(sidecar, Sidecar)
    return sidecar.fisher


def row_for(task: str, draw: tiny_tasks.Draw) -> dict[str, Any]:
    def text(length: int) -> str:
        # The last ids stand for images in some models.
        return " ".join(f"w{draw.number(5, 60)}" for _ in range(length))

    words = text(9)
    rows: dict[str, dict[str, Any]] = {
        "sequence-classification": {"text": words, "label": draw.number(0, 3)},
        "token-classification": {"tokens": words.split(), "tags": [draw.number(0, 3) for _ in range(9)]},
        "multiple-choice": {"question": words, "choices": [text(3), text(4)], "label": draw.number(0, 2)},
        "question-answering": {
            "question": text(3),
            "context": words,
            "answers": {"text": [words.split()[0]], "answer_start": [0]},
        },
        "seq2seq-lm": {"source": words, "target": text(5)},
    }
    return rows.get(task, {"text": words})


@each
def test_a_merge_through_mergekit(family: Family, tmp_path: Path) -> None:
    """With all that mask nodes can govern; the paper's is part of it."""
    parent, sites = model_of(family)
    if not sites:
        pytest.skip("no mask nodes")
    models = [sibling(parent, seed) for seed in (1, 2)]
    folders = [tmp_path / "one", tmp_path / "two"]
    make = write_checkpoint if family.name in WITHOUT_TASK else compute_checkpoint
    fishers = [
        make(model, folder, seed) for seed, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]
    recipe = {
        "merge_method": "fisher_mask",
        "models": [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders],
        "parameters": {"nodes": "columns", "values": True},
        "base_model": str(folders[0]),
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    given = [str(tmp_path / "recipe.yml"), str(tmp_path / "merged"), "--no-copy-tokenizer"]
    result = click.testing.CliRunner().invoke(run_yaml.main, given)
    if isinstance(family.merge, Fails):
        assert type(result.exception).__name__ == family.merge.error
        assert family.merge.message in str(result.exception)
        return
    assert result.exit_code == 0, result.output or result.exception
    merged, report = type(parent).from_pretrained(tmp_path / "merged", output_loading_info=True)
    lost = family.merge.parts if isinstance(family.merge, Loses) else ()
    assert all(any(part in name for part in lost) for name in report["missing_keys"])
    assert bool(report["missing_keys"]) == bool(lost)
    by_name = {
        tensor.name: (site, tensor) for site in sites for tensor in site.tensors if tensor.layout != "mean"
    }
    states = [dict(model.named_parameters()) for model in models]
    weighted = set()
    for name, value in merged.named_parameters():
        if name in report["missing_keys"] or any(part in name for part in lost):
            continue
        one, two = (state[name].double() for state in states)
        shares = [torch.ones(1).double()] * 2
        if name in by_name:
            site, tensor = by_name[name]
            shares = [rows_fisher(site, tensor, fisher[site.output]) for fisher in fishers]
            shares = [torch.where(shares[0] + shares[1] > 0, share, 1.0) for share in shares]
            weighted.add(tensor.layout)
        wanted = (shares[0] * one + shares[1] * two) / (shares[0] + shares[1])
        assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
    assert weighted & {"columns h", "columns n"}
    assert weighted - {"columns h", "columns n"}


def rows_fisher(site: Site, tensor: GovernedTensor, fisher: Mapping[Node, Tensor]) -> Tensor:
    """With the values."""
    return row_fisher(site, tensor, fisher, fisher.get("kv_head_fisher", torch.ones(1))).double()


@pytest.mark.parametrize("remote", REMOTE, ids=str)
def test_architectures_with_code_of_their_own_by_their_tensors(remote: Remote) -> None:
    shapes = dict(remote.tensors)
    transposed = [name for name in shapes if remote.conv1d and name.endswith(".weight")]
    model_type = {"phi3-small": "phi3small"}.get(remote.name, remote.name)
    sites = find_sites(shapes, remote.heads[0], transposed=transposed, model_type=model_type)
    prefixes = [remote.prefix.format(layer) for layer in remote.layers]
    assert {site.output for site in sites} == {prefix + out for prefix in prefixes for out in remote.out}
    layouts = {"separate": {"q", "k", "v"}, "blocks": {"q k v"}, "grouped": {"(q k v)"}}[remote.layout]
    for site in sites:
        found = {tensor.layout for tensor in site.tensors} - {"mean"}
        if site.kind == "attention":
            assert (site.heads, site.kv_heads) == remote.heads
            assert found == layouts | {"columns h"}
        else:
            assert site.neurons == remote.neurons
            assert ("(n n)" in found) == remote.interleaved
            assert "columns n" in found
        for tensor in site.tensors:
            along_columns = tensor.layout.startswith("columns") != remote.conv1d
            assert tensor.axis == int(along_columns and len(tensor.shape) == 2)
