"""Experts that share one tensor in memory and have tensors of their own in the checkpoint's files."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fisher_mask_mergekit import mask_gradients
from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.expert_gradients import can_run, run_experts
from fisher_mask_mergekit.fisher import mask_fisher
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import row_fisher
from tests import tiny
from tests.families import FAMILIES, Family, build, sibling
from tests.test_architectures import TASK, WITH_EXPERTS, batches, model_of
from tests.test_end_to_end import quickly, weights_of

MIXTRAL = next(family for family in FAMILIES if family.name == "mixtral")
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def measured(folder: Path, data: Path, dtype: Any = "float32") -> Sidecar:
    build(MIXTRAL).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    job = prepare(str(folder), FisherSettings(data=str(data), samples=6, dtype=dtype))
    sidecar = compute(job, torch.device("cpu")).sidecar
    assert isinstance(sidecar, Sidecar)
    return sidecar


def test_an_expert_that_no_token_reached_has_zero() -> None:
    model, sites = model_of(MIXTRAL)
    reached: list[set[int]] = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: reached.append(set(args[1].flatten().tolist()))
    )
    # A single token reaches two of four experts.
    (batch,) = batches(MIXTRAL, (1,))
    inputs = {name: value[:, :1] for name, value in batch.inputs.items()}
    got = mask_fisher(model, [type(batch)(inputs, batch.labels, batch.index)], sites, TASK)
    hook.remove()
    fisher = got.fisher["model.layers.0.mlp.experts.down_proj", "neuron_fisher"]
    assert len(reached[0]) == 2
    for expert in range(4):
        assert bool((fisher[expert] > 0).any()) == (expert in reached[0])
        assert bool((fisher[expert] == 0).all()) == (expert not in reached[0])


@pytest.mark.parametrize("family", WITH_EXPERTS, ids=str)
def test_samples_run_in_batches(family: Family) -> None:
    model, sites = model_of(family)
    # Images in patches have no batch axis.
    sizes = (1,) * 3 if family.inputs == "text and patches" else (3,)
    got = mask_fisher(model, batches(family, sizes), sites, TASK)
    assert not got.one_by_one
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_experts_that_cannot_be_run_here_are_seen_by_their_weights_one_sample_at_a_time(
    placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sites = model_of(MIXTRAL)
    wanted = mask_fisher(model, batches(MIXTRAL, (3,)), sites, TASK, mask_placement=placement)
    monkeypatch.setattr(mask_gradients, "can_run", lambda experts: False)
    got = mask_fisher(model, batches(MIXTRAL, (3,)), sites, TASK, mask_placement=placement)
    assert (got.one_by_one, wanted.one_by_one) == (True, False)
    assert_close(got.fisher, wanted.fisher, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", WITH_EXPERTS, ids=str)
def test_experts_run_here_give_what_transformers_runs_give(family: Family) -> None:
    model = build(family).double()
    if family.name != "llama4":
        model.set_experts_implementation("eager")
    (batch,) = batches(family, (3,))
    given = {
        name: value.double() if value.is_floating_point() else value for name, value in batch.inputs.items()
    }
    wanted = model(**given)[0]
    for module in model.modules():
        if can_run(module):
            module.forward = partial(run_experts, module)
    got = model(**given)[0]
    assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_governed_tensor_is_known_under_both_its_names(tmp_path: Path) -> None:
    found = measured(tmp_path / "model", tiny.write_data(tmp_path / "data.jsonl"))
    files = tensor_shapes(locate(str(tmp_path / "model")))
    site, fused = found.governed[FUSED]
    assert FUSED not in files
    assert found.fisher[site.output]["neuron_fisher"].shape == (4, 40)
    share = row_fisher(site, fused, found.fisher[site.output], torch.ones(1))
    for expert in range(4):
        for part, name in enumerate(("w1", "w3")):
            single = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            assert single in files
            own_site, own = found.governed[single]
            assert own_site == site
            rows = row_fisher(site, own, found.fisher[site.output], torch.ones(1))
            assert_close(rows, share[expert, 40 * part : 40 * (part + 1)])
        own_site, own = found.governed[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert own_site == site
        columns = row_fisher(site, own, found.fisher[site.output], torch.ones(1))
        assert_close(columns[0], found.fisher[site.output]["neuron_fisher"][expert])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_values_of_fused_tensors_lose_no_digits_to_the_dtype_measured_in(
    tmp_path: Path, dtype: str
) -> None:
    found = measured(tmp_path / "model", tiny.write_data(tmp_path / "data.jsonl"), dtype)
    fused = build(MIXTRAL).get_parameter(FUSED).detach()
    assert found.identify(FUSED, fused) is not None
    assert found.identify(FUSED, fused.bfloat16()) is not None
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float32


def test_files_that_store_experts_transposed_are_merged_as_they_are(tmp_path: Path) -> None:
    """The hub's Qwen3-VL-MoE files are [E, in, out]; mergekit takes them so, the model in memory does not."""
    family = next(family for family in FAMILIES if family.name == "qwen3-vl-moe")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "w{5 + row} w{6 + row} w{9 + row}"}}\n' for row in range(6)))
    states, fishers = [], []
    for name, seed in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        sibling(build(family), seed).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        state = {
            key: value.transpose(1, 2).contiguous() if ".experts." in key else value
            for key, value in load_file(folder / "model.safetensors").items()
        }
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        states.append(state)
        done = compute(prepare(str(folder), FisherSettings(data=str(data))), torch.device("cpu"))
        assert isinstance(done.sidecar, Sidecar)
        fishers.append(done.sidecar.fisher)
    lines = [f"  - {{model: {tmp_path / name}, parameters: {{weight: 1.0}}}}" for name in ("one", "two")]
    head = f"merge_method: fisher_mask\nbase_model: {tmp_path / 'one'}\ndtype: float32\nmodels:"
    (tmp_path / "recipe.yml").write_text("\n".join([head, *lines]))
    quickly("mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "merged", "--no-copy-tokenizer")
    merged = weights_of(tmp_path / "merged")
    experts = "model.language_model.layers.1.mlp.experts"
    both = [fisher[f"{experts}.down_proj"]["neuron_fisher"] for fisher in fishers]
    one, two = (torch.where(both[0] + both[1] > 0, fisher, 1.0).repeat(1, 2)[:, None, :] for fisher in both)
    first, second = (state[f"{experts}.gate_up_proj"] for state in states)
    assert first.shape == (4, 32, 80)
    assert_close(merged[f"{experts}.gate_up_proj"], (one * first + two * second) / (one + two))
