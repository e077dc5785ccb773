"""What weights the rows and columns of tensors: each element's, written out, in float64."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit.errors import FisherMaskError, SidecarMismatchError
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import Node, Site
from fisher_mask_mergekit.weighting import Normalize, Scheme, fisher_rows, merge_rows
from tests.families import FAMILIES, build
from tests.test_sidecar import sidecar_for


def sidecars(family: str) -> list[Sidecar]:
    model = build(next(one for one in FAMILIES if one.name == family))
    return [sidecar_for(model, seed=seed) for seed in (0, 1)]


Owner = tuple[str, int]
"""Who a row or a column belongs to: queries, keys, values, heads' outputs, neurons, a neuron's output; and which."""


def in_turn(site: Site, queries: int) -> list[Owner]:
    """Of every key-value head its queries, its key and its value."""
    rows: list[Owner] = []
    for key in range(site.kv_heads):
        for query in range(queries):
            rows += [("query", key * queries + query)] * site.head_dim
        rows += [("key", key)] * site.head_dim + [("value", key)] * site.head_dim
    return rows


def one_after_the_other(site: Site) -> list[Owner]:
    heads = [("query", head) for head in range(site.heads)]
    heads += [(kind, head) for kind in ("key", "value") for head in range(site.kv_heads)]
    return [owner for owner in heads for _ in range(site.head_dim)]


def latent(site: Site) -> list[Owner]:
    """Of every head 8 rows of its key, the others of its value."""
    return [
        ("key" if row < 8 else "value", head)
        for head in range(site.heads)
        for row in range(8 + site.head_dim)
    ]


def of(kind: str, width: int, count: int) -> Callable[[Site], list[Owner]]:
    return lambda site: [(kind, place) for place in range(count) for _ in range(width)]


CASES: list[tuple[str, str, int, Callable[[Site], list[Owner]]]] = [
    ("gpt2", "transformer.h.0.attn.c_attn.weight", 1, one_after_the_other),
    ("gpt2", "transformer.h.0.attn.c_attn.bias", 0, one_after_the_other),
    ("gpt2", "transformer.h.0.attn.c_proj.weight", 0, of("output", 8, 4)),
    ("gpt2", "transformer.h.1.mlp.c_proj.weight", 0, of("down", 1, 56)),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight", 0, one_after_the_other),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight", 0, lambda site: 2 * of("neuron", 1, 56)(site)),
    ("falcon-40b", "transformer.h.0.self_attention.query_key_value.weight", 0, lambda site: in_turn(site, 2)),
    ("falcon-7b", "transformer.h.1.self_attention.query_key_value.weight", 0, lambda site: in_turn(site, 4)),
    ("deepseek-v2", "model.layers.0.self_attn.kv_b_proj.weight", 0, latent),
    ("deepseek-v2", "model.layers.1.mlp.shared_experts.down_proj.weight", 1, of("down", 1, 40)),
    ("mixtral", "model.layers.1.self_attn.v_proj.weight", 0, of("value", 12, 2)),
    ("mixtral", "model.layers.1.self_attn.o_proj.weight", 1, of("output", 12, 4)),
    ("mixtral", "model.layers.1.mlp.experts.down_proj", 2, of("down", 1, 40)),
    ("gpt-oss", "model.layers.1.self_attn.v_proj.bias", 0, of("value", 12, 2)),
    ("gpt-oss", "model.layers.1.mlp.experts.gate_up_proj", 2, of("neuron", 2, 40)),
    ("gpt-oss", "model.layers.1.mlp.experts.down_proj", 1, of("down", 1, 40)),
]  # fmt: skip
NODE: Mapping[str, Node] = {
    "query": "head_fisher", "key": "kv_head_fisher", "value": "kv_head_fisher", "output": "head_fisher",
    "neuron": "neuron_fisher", "down": "neuron_fisher",
}  # fmt: skip


def dense(sidecar: Sidecar, name: str, axis: int, owners: list[Owner], scheme: Scheme) -> Tensor:
    """The Fisher information of every element of a tensor, not a number where it is averaged."""
    site, tensor = sidecar.governed[name]
    fisher = torch.full(tensor.shape, torch.nan, dtype=torch.float64)
    left_out = {"down"} if scheme.nodes == "paper" else set()
    left_out |= set() if scheme.values else {"value", "output"}
    assert len(owners) == tensor.shape[axis]
    for place, (kind, index) in enumerate(owners):
        if kind not in left_out:
            vector = sidecar.fisher[site.output][NODE[kind]].double()
            scale = torch.ones(()).double()
            if scheme.normalize == "layer":
                scale = vector.mean()
            elif scheme.normalize == "model":
                alike = [v[NODE[kind]].double().flatten() for v in sidecar.fisher.values() if NODE[kind] in v]
                scale = torch.cat(alike).mean()
            own = vector[..., index] / scale  # Of every expert, where there are some.
            fisher.select(axis, place).copy_(own if own.ndim == 0 else own[:, None])
    if scheme.normalize == "tensor":
        fisher /= fisher[~fisher.isnan()].mean()
    return fisher


@pytest.mark.parametrize(("family", "name", "axis", "owners"), CASES)
def test_every_element_is_weighted_by_the_node_that_it_belongs_to(
    family: str, name: str, axis: int, owners: Callable[[Site], list[Owner]]
) -> None:
    both = sidecars(family)
    found = [one.governed[name] for one in both]
    one, two = (torch.randn(found[0][1].shape, dtype=torch.float64) for _ in both)
    for nodes, values, normalize in product(("paper", "columns"), (False, True), get_args(Normalize)):
        scheme = Scheme(nodes, values, normalize)  # type: ignore[arg-type]
        first, second = (dense(s, name, axis, owners(s.governed[name][0]), scheme) for s in both)
        wanted = (first * one + 3 * second * two) / (first + 3 * second)
        wanted = torch.where(wanted.isnan(), (one + 3 * two) / 4, wanted)
        fishers = fisher_rows(both, found, one.ndim, scheme)
        assert (fishers is None) == bool(first.isnan().all())
        assert_close(merge_rows([one, two], [1.0, 3.0], fishers), wanted, rtol=1e-12, atol=1e-12)
        if fishers is not None and normalize == "tensor":
            means = [f.expand(one.shape)[~first.isnan()].mean() for f in fishers]
            assert_close(torch.stack(means), torch.ones(2).double())


@pytest.mark.parametrize("unmasked", ["layer", "universal"])
def test_a_tensor_with_one_value_is_its_own_mean(unmasked: Any) -> None:
    both = sidecars("bert-sequence")
    scheme = Scheme(normalize="tensor", unmasked=unmasked)
    for name in (
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.0.attention.self.value.bias",
    ):
        rows = fisher_rows(both, [one.governed[name] for one in both], 1, scheme)
        assert_close(rows, [torch.ones(1).double()] * 2)


@pytest.mark.parametrize("normalize", ["layer", "tensor"])
def test_a_site_that_matters_to_no_sample_of_a_model_is_not_divided_by_zero(normalize: Any) -> None:
    both = sidecars("llama")
    name = "model.layers.0.self_attn.v_proj.weight"
    site, _ = both[0].governed[name]
    both[0].fisher[site.output]["kv_head_fisher"].zero_()
    rows = fisher_rows(
        both, [one.governed[name] for one in both], 2, Scheme(values=True, normalize=normalize)
    )
    assert rows is not None
    assert_close(rows[0], torch.zeros_like(rows[0]))
    assert_close(rows[1].mean(), torch.ones(()).double())


def test_the_scheme_that_needs_another_sidecar_is_refused() -> None:
    with pytest.raises(FisherMaskError, match="nodes is 'all', which merges by another kind of sidecar"):
        Scheme(nodes="all")


@pytest.mark.parametrize(("family", "name"), [
    ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ("falcon-40b", "transformer.h.0.self_attention.query_key_value.weight"),
])  # fmt: skip
def test_value_rows_of_a_fused_tensor_are_weighted_as_a_value_matrix_would_be(family: str, name: str) -> None:
    both = sidecars(family)
    for sidecar in both:
        site, tensor = sidecar.governed[name]
        heads = sidecar.fisher[site.output]["head_fisher"].double()
        groups, width = site.kv_heads, site.head_dim
        found = [one.governed[name] for one in both]
        for unmasked, wanted in (("average", 1.0), ("layer", float(heads.mean()))):
            rows = fisher_rows(both, found, 2, Scheme(unmasked=unmasked))  # type: ignore[arg-type]
            assert rows is not None
            own = rows[both.index(sidecar)].flatten()
            if tensor.layout == "q k v":
                values = own[-groups * width :]
            else:
                values = own.reshape(groups, -1)[:, -width:].flatten()
            assert_close(values, torch.full_like(values, wanted))
            assert_close(own[:width], heads[:1].expand(width))


def test_one_expert_is_not_another() -> None:
    both = sidecars("mixtral")
    site, tensor = both[0].governed["model.layers.1.mlp.experts.gate_up_proj"]
    ones = [
        (site, tensor.model_copy(update={"shape": (40, 32), "layout": "n", "axis": 0, "expert": expert}))
        for expert in (0, 1)
    ]
    with pytest.raises(
        SidecarMismatchError, match=r"neuron \[4, 40\] of expert 0 along axis 0 .* of expert 1 along"
    ):
        fisher_rows(both, ones, 2, Scheme())


@pytest.mark.parametrize("normalize", ["none", "model", "layer", "tensor"])
def test_experts_are_normalized_by_the_mean_over_all_of_them(normalize: str) -> None:
    both = sidecars("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = [one.governed[name] for one in both]
    rows = fisher_rows(both, found, 3, Scheme(normalize=normalize))  # type: ignore[arg-type]
    assert rows is not None
    for sidecar, got in zip(both, rows, strict=True):
        site, _ = sidecar.governed[name]
        vector = sidecar.fisher[site.output]["neuron_fisher"].double()
        everywhere = [
            v["neuron_fisher"].double().flatten() for v in sidecar.fisher.values() if "neuron_fisher" in v
        ]
        means: dict[str, Any] = {
            "none": 1.0,
            "model": torch.cat(everywhere).mean(),
            "layer": vector.mean(),
            "tensor": vector.mean(),
        }
        assert got.shape == (4, 80, 1)
        assert_close(got[:, :40, 0], vector / means[normalize])
        assert_close(got[:, 40:, 0], vector / means[normalize])
