"""What `benchmarks/scaling.py` counts on paper, against tiny models of the same kind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.mask_gradients import MaskGradients
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.skeleton import sites_in, skeleton
from fisher_mask_mergekit.tasks import Batch, CausalLM
from tests import tiny
from tests.benchmarks import BENCHMARKS, benchmark

SAMPLES, LENGTH = 3, 32
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def shape_of(config: Any) -> Any:
    """What `scaling.py` knows of a Llama or a Llama 4."""
    moe = len(getattr(config, "moe_layers", None) or ())
    return benchmark("scaling").Shape(
        "",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size_mlp if moe else config.intermediate_size,
        config.vocab_size,
        config.vocab_size,
        moe=moe,
        experts=config.num_local_experts if moe else 0,
        expert=config.intermediate_size if moe else 0,
        shared=config.intermediate_size if moe else 0,
    )


def workload(dtype: torch.dtype, attention: str) -> Any:
    config = LlamaConfig(**SIZES, intermediate_size=160, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    ids = torch.randint(5, config.vocab_size, (SAMPLES, LENGTH))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, tuple(range(SAMPLES)))
    kind = benchmark("workload").Workload
    return kind(model, [batch], sites_in(model), CausalLM(), torch.device("cpu"))


def flops(counted: FlopCounterMode) -> int:
    """Without the rotary embedding's angles, which some versions of transformers get by multiplying matrices."""
    angles = counted.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
    return counted.get_total_flops() - sum(angles.values())


def test_the_flops_are_those_that_torch_counts() -> None:
    scaling, passes = benchmark("scaling"), benchmark("passes")
    work = workload(torch.float32, "eager")
    shape, tokens = shape_of(work.model.config), SAMPLES * LENGTH
    forward = scaling.forward_flops(shape, tokens, LENGTH)
    both = forward + scaling.backward_flops(shape, tokens, LENGTH)
    with FlopCounterMode(display=False) as counted:
        passes.lower_bound(work)
    assert flops(counted) == both
    with FlopCounterMode(display=False) as counted:
        passes.pre_pass(work)
    # One of the first batch's samples run by itself, forward alone.
    assert flops(counted) == both + forward // SAMPLES


def fused() -> bool:
    """Whether this torch's attention on the CPU keeps no scores where several heads share a key."""
    query, key = (
        torch.zeros(1, 4, LENGTH, 16).bfloat16().requires_grad_(),
        torch.zeros(1, 2, LENGTH, 16).bfloat16(),
    )
    chosen = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=True)
    return chosen == SDPBackend.FLASH_ATTENTION.value


@pytest.mark.skipif(not fused(), reason="what is counted is fused attention")
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_is_what_autograd_keeps(recompute: bool) -> None:
    work = workload(torch.bfloat16, "sdpa")
    weights = {parameter.untyped_storage().data_ptr() for parameter in work.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    gradients = MaskGradients(work.model, work.sites, "post", "sample", recompute)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), gradients.attached():
        gradients.run(work.task, work.batches[0])
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    shape = shape_of(work.model.config)
    paper = benchmark("scaling").kept_bytes(shape, SAMPLES * LENGTH, recompute=recompute)
    assert_close(float(paper), float(found), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_parameters_and_sidecars_have_the_size_that_they_have(kind: str, tmp_path: Path) -> None:
    scaling = benchmark("scaling")
    config: Any = LlamaConfig(**SIZES, intermediate_size=160)
    if kind == "llama4":
        config = Llama4TextConfig(
            **SIZES, intermediate_size=48, intermediate_size_mlp=96, head_dim=16, num_local_experts=4,
            interleave_moe_layer_step=2, pad_token_id=0,
        )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    folder = tiny.save(model, tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "w5 w6 w7"}) + "\n")
    done = compute(prepare(str(folder), FisherSettings(data=str(data), samples=1)), torch.device("cpu"))
    tensors = load_file(done.path).values()
    assert sum(tensor.nbytes for tensor in tensors) == scaling.sidecar_bytes(shape)
    assert sum(tensor.numel() for tensor in tensors) - 16 * shape.governed == shape.nodes


def test_the_large_shapes_are_those_of_the_models() -> None:
    # What their authors publish: 8B, 70B and 400B.
    assert [round(shape.parameters / 1e8) for shape in benchmark("scaling").SHAPES] == [80, 706, 4007]
    llama = benchmark("scaling").SHAPES[0]
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14336,
    )  # fmt: skip
    assert shape_of(config) == type(llama)(**vars(llama) | {"name": ""})
    model = skeleton(LlamaForCausalLM, config)
    assert llama.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_record_is_what_the_script_makes() -> None:
    made = benchmark("scaling").record()
    assert json.loads((BENCHMARKS / "results" / "scaling.json").read_text()) == json.loads(json.dumps(made))
