"""Decoders with a mixture of experts."""

from tests.families.decoders import ALTERNATING, LLAMA, MHA, WIDE
from tests.families.family import EXPERT_NEURONS, NO_EXPERTS, Family, requires

FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_NEURONS}
# These have no dense layer, their experts are as wide as the configuration's FFN.
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": EXPERT_NEURONS}
SHARED = FOUR | {"shared_expert_intermediate_size": 24}
GLM4_MOE = WIDE | FOUR | {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True,
    "attention_bias": True,
}  # fmt: skip
AFMOE = (
    WIDE
    | FOUR
    | {"num_dense_layers": 1, "num_shared_experts": 1, "global_attn_every_n_layers": 2, "sliding_window": 4}
)
GRANITE_HYBRID = LLAMA | LOCAL | {
    "layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 24, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
QWEN3_NEXT = LLAMA | SHARED | {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MLA = LLAMA | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_NEURONS,
    "n_shared_experts": 1, "first_k_dense_replace": 0,
}  # fmt: skip
DEEPSEEK_V3 = MLA | {"n_group": 2, "topk_group": 1}
DENSE_FIRST = {"first_k_dense_replace": 1}
JAMBA = LLAMA | {
    "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}  # fmt: skip
JAMBA_ALL = JAMBA | {"expert_layer_period": 1, "expert_layer_offset": 0}

EXPERTS = (
    # With a file of mergekit's.
    Family("mixtral", "MixtralForCausalLM", WIDE | LOCAL, json="mixtral"),
    Family("qwen3-moe", "Qwen3MoeForCausalLM", WIDE | FOUR, json="qwen3_moe"),
    Family("qwen3-moe-dense-first", "Qwen3MoeForCausalLM", WIDE | FOUR | {"mlp_only_layers": [0]}, json="qwen3_moe", merge=requires("model.layers.0.mlp.experts.down_proj")),
    Family("glm4-moe", "Glm4MoeForCausalLM", GLM4_MOE, json="glm4moe"),
    Family("afmoe", "AfmoeForCausalLM", AFMOE, json="afmoe_partial"),
    Family("granite-hybrid", "GraniteMoeHybridForCausalLM", GRANITE_HYBRID, json="granite4moehybrid"),
    Family("granite-hybrid-dense", "GraniteMoeHybridForCausalLM", GRANITE_HYBRID | {"num_local_experts": 0}, json="granite4moehybrid", merge=requires("model.layers.0.block_sparse_moe.input_linear.weight")),
    # Inferred.
    Family("qwen2-moe", "Qwen2MoeForCausalLM", LLAMA | SHARED),
    Family("qwen2-moe-dense-first", "Qwen2MoeForCausalLM", LLAMA | SHARED | {"mlp_only_layers": [0]}, merge=NO_EXPERTS),
    Family("olmoe", "OlmoeForCausalLM", LLAMA | FOUR | {"intermediate_size": EXPERT_NEURONS}, coupled=True),
    Family("phimoe", "PhimoeForCausalLM", LLAMA | LOCAL),
    Family("qwen3-next", "Qwen3NextForCausalLM", QWEN3_NEXT),
    Family("deepseek-v2", "DeepseekV2ForCausalLM", MLA, heads=MHA),
    Family("deepseek-v2-lite", "DeepseekV2ForCausalLM", MLA | DENSE_FIRST | {"q_lora_rank": None}, heads=MHA, merge=NO_EXPERTS),
    Family("deepseek-v3", "DeepseekV3ForCausalLM", DEEPSEEK_V3, heads=MHA),
    Family("deepseek-v3-dense-first", "DeepseekV3ForCausalLM", DEEPSEEK_V3 | DENSE_FIRST, heads=MHA, merge=NO_EXPERTS),
    Family("deepseek-v3-moonlight", "DeepseekV3ForCausalLM", DEEPSEEK_V3 | DENSE_FIRST | {"q_lora_rank": None}, heads=MHA, merge=NO_EXPERTS),
    Family("jamba", "JambaForCausalLM", JAMBA, merge=NO_EXPERTS),
    Family("jamba-experts-everywhere", "JambaForCausalLM", JAMBA_ALL),
    Family("gpt-oss", "GptOssForCausalLM", WIDE | LOCAL | ALTERNATING),
)  # fmt: skip
