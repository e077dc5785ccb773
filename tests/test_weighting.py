"""What weights the rows of tensors that hold several things at once."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.weighting import fisher_rows
from tests.families import FAMILIES, build
from tests.test_sidecar import sidecar_for


def sidecars(family: str) -> list[Sidecar]:
    model = build(next(one for one in FAMILIES if one.name == family))
    return [sidecar_for(model, seed=seed) for seed in (0, 1)]


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
            rows = fisher_rows(both, found, 2, "none", unmasked)  # type: ignore[arg-type]
            assert rows is not None
            own = rows[both.index(sidecar)].flatten()
            if tensor.layout == "q k v":
                values = own[-groups * width :]
            else:
                values = own.reshape(groups, -1)[:, -width:].flatten()
            assert_close(values, torch.full_like(values, wanted))
            assert_close(own[:width], heads[:1].expand(width))


@pytest.mark.parametrize("normalize", ["none", "model", "layer"])
def test_experts_are_normalized_by_the_mean_over_all_of_them(normalize: str) -> None:
    both = sidecars("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rows = fisher_rows(both, [one.governed[name] for one in both], 3, normalize, "average")  # type: ignore[arg-type]
    assert rows is not None
    for sidecar, got in zip(both, rows, strict=True):
        site, _ = sidecar.governed[name]
        vector = sidecar.fisher[site.output]["neuron_fisher"].double()
        everywhere = [
            v["neuron_fisher"].double().flatten() for v in sidecar.fisher.values() if "neuron_fisher" in v
        ]
        means: dict[str, Any] = {"none": 1.0, "model": torch.cat(everywhere).mean(), "layer": vector.mean()}
        assert got.shape == (4, 80, 1)
        assert_close(got[:, :40, 0], vector / means[normalize])
        assert_close(got[:, 40:, 0], vector / means[normalize])
