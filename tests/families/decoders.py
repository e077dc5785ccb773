"""Decoders with a dense FFN, and the attention-free ones."""

from tests.families.family import HIDDEN, NEURONS, PAD, VOCABULARY, Family, Loses, requires

# A head is not hidden size / heads wide, wherever the family allows that.
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
WIDE = LLAMA | {"head_dim": 12}
BOTH_BIASES = {"attention_bias": True, "mlp_bias": True}
ALTERNATING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA2 = WIDE | ALTERNATING | {"query_pre_attn_scalar": 12}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": NEURONS, "n_positions": 40,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
FALCON = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "ffn_hidden_size": NEURONS, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}
FALCON_RW = FALCON | {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False}
STABLELM_12B = LLAMA | {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}
LFM2 = LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
LFM2_ADJUSTED = LFM2 | {"block_auto_adjust_ff_dim": True, "block_multiple_of": 4}
OPT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "ffn_dim": NEURONS, "max_position_embeddings": 40, "word_embed_proj_dim": HIDDEN, "pad_token_id": PAD,
}  # fmt: skip
OPT_350M = OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4}
GPT_NEO = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4, "intermediate_size": NEURONS,
    "max_position_embeddings": 40, "window_size": 4, "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MPT = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "n_heads": 4,
    "n_layers": 2,
    "expansion_ratio": 2,
    "max_seq_len": 40,
}
MINICPM3 = LLAMA | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "dim_model_base": 16,
}  # fmt: skip
MAMBA = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
MHA, MQA = (("", 4, 4),), (("", 4, 1),)

DECODERS = (
    # With a file of mergekit's.
    Family("llama", "LlamaForCausalLM", WIDE, json="llama"),
    Family("llama-biases", "LlamaForCausalLM", WIDE | BOTH_BIASES, json="llama", merge=Loses(("_proj.bias",))),
    Family("llama-tied", "LlamaForCausalLM", WIDE | {"tie_word_embeddings": True}, json="llama"),
    Family("llama-sequence", "LlamaForSequenceClassification", WIDE, json="llama-sequence-classification"),
    Family("mistral", "MistralForCausalLM", WIDE, json="mistral"),
    Family("gemma", "GemmaForCausalLM", WIDE, json="gemma"),
    Family("gemma2", "Gemma2ForCausalLM", GEMMA2, json="gemma2"),
    Family("gemma3", "Gemma3ForCausalLM", GEMMA2, json="gemma3"),
    Family("granite", "GraniteForCausalLM", LLAMA, json="granite"),
    Family("granite-biases", "GraniteForCausalLM", LLAMA | BOTH_BIASES, json="granite"),
    Family("cohere", "CohereForCausalLM", LLAMA, json="cohere", merge=requires("model.layers.0.self_attn.q_norm.weight")),
    Family("cohere-plus", "CohereForCausalLM", LLAMA | {"use_qk_norm": True}, json="cohere"),
    Family("cohere2", "Cohere2ForCausalLM", LLAMA | ALTERNATING, json="cohere2"),
    Family("olmo2", "Olmo2ForCausalLM", LLAMA, json="olmo2", coupled=True),
    Family("qwen2", "Qwen2ForCausalLM", LLAMA, json="qwen2"),
    Family("qwen3", "Qwen3ForCausalLM", WIDE, json="qwen3"),
    Family("stablelm2", "StableLmForCausalLM", LLAMA, json="stablelm2"),
    Family("stablelm2-12b", "StableLmForCausalLM", STABLELM_12B, json="stablelm2", merge=requires("model.layers.0.post_attention_layernorm.weight")),
    Family("glm4", "Glm4ForCausalLM", WIDE, json="glm4"),
    Family("arcee", "ArceeForCausalLM", WIDE, json="arcee"),
    Family("apertus", "ApertusForCausalLM", LLAMA, json="apertus"),
    Family("starcoder2", "Starcoder2ForCausalLM", LLAMA, json="starcoder2"),
    Family("phi2", "PhiForCausalLM", LLAMA, json="phi2"),
    Family("phi2-qk-norm", "PhiForCausalLM", LLAMA | {"qk_layernorm": True}, json="phi2", merge=Loses((".q_layernorm.", ".k_layernorm."))),
    Family("phi3", "Phi3ForCausalLM", LLAMA, json="phi3"),
    Family("lfm2", "Lfm2ForCausalLM", LFM2, json="lfm2"),
    Family("lfm2-adjusted", "Lfm2ForCausalLM", LFM2_ADJUSTED, json="lfm2"),
    Family("gpt2", "GPT2LMHeadModel", GPT2, json="gpt2", heads=MHA),
    Family("gpt2-sequence", "GPT2ForSequenceClassification", GPT2, json="gpt2-sequence-classification", heads=MHA),
    Family("gptbigcode", "GPTBigCodeForCausalLM", GPT2, json="gptbigcode", heads=MQA),
    Family("gptbigcode-mha", "GPTBigCodeForCausalLM", GPT2 | {"multi_query": False}, json="gptbigcode", heads=MHA),
    Family("gpt-neox", "GPTNeoXForCausalLM", LLAMA, json="gpt-neox", heads=MHA, merge=requires("gpt_neox.layers.0.attention.bias")),
    Family("falcon-7b", "FalconForCausalLM", FALCON, json="falcon", heads=MQA, merge=requires("transformer.h.0.ln_attn.bias")),
    Family("falcon-40b", "FalconForCausalLM", FALCON_40B, json="falcon", merge=requires("lm_head.weight")),
    Family("falcon-40b-untied", "FalconForCausalLM", FALCON_40B | {"tie_word_embeddings": False}, json="falcon"),
    Family("falcon-rw", "FalconForCausalLM", FALCON_RW, json="falcon", heads=MHA, merge=requires("transformer.h.0.ln_attn.bias")),
    Family("mamba", "MambaForCausalLM", MAMBA, json="mamba", sites=()),
    # Inferred.
    Family("mistral-sequence", "MistralForSequenceClassification", WIDE),
    Family("qwen2-sequence", "Qwen2ForSequenceClassification", LLAMA),
    Family("qwen3-sequence", "Qwen3ForSequenceClassification", WIDE),
    Family("gemma2-sequence", "Gemma2ForSequenceClassification", GEMMA2),
    Family("gemma3-text-sequence", "Gemma3TextForSequenceClassification", GEMMA2),
    Family("olmo", "OlmoForCausalLM", LLAMA),
    Family("olmo3", "Olmo3ForCausalLM", LLAMA | ALTERNATING, coupled=True),
    Family("smollm3", "SmolLM3ForCausalLM", LLAMA | {"no_rope_layers": [1, 0]}),
    Family("exaone4", "Exaone4ForCausalLM", WIDE | ALTERNATING),
    Family("ernie4.5", "Ernie4_5ForCausalLM", WIDE | {"use_bias": True}),
    Family("glm", "GlmForCausalLM", WIDE),
    Family("nemotron", "NemotronForCausalLM", WIDE),
    Family("persimmon", "PersimmonForCausalLM", LLAMA, heads=MHA),
    Family("ministral", "MinistralForCausalLM", WIDE | ALTERNATING),
    Family("seed-oss", "SeedOssForCausalLM", WIDE),
    Family("hunyuan", "HunYuanDenseV1ForCausalLM", WIDE),
    Family("minicpm3", "MiniCPM3ForCausalLM", MINICPM3, heads=MHA),
    Family("opt", "OPTForCausalLM", OPT, heads=MHA),
    Family("opt-350m", "OPTForCausalLM", OPT_350M, heads=MHA),
    Family("bloom", "BloomForCausalLM", BLOOM, heads=MHA),
    Family("gpt-neo", "GPTNeoForCausalLM", GPT_NEO, heads=MHA),
    Family("gpt-j", "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}, heads=MHA),
    Family("mpt", "MptForCausalLM", MPT, heads=MHA),
    # The rows of its fused projection are shuffled for a partition into four.
    Family("codegen", "CodeGenForCausalLM", GPT2 | {"rotary_dim": 4}, heads=MHA, sites=("ffn",)),
    # Its heads are subtracted from one another in pairs.
    Family("diffllama", "DiffLlamaForCausalLM", LLAMA, sites=("ffn",)),
    Family("mamba2", "Mamba2ForCausalLM", MAMBA2, sites=()),
)  # fmt: skip
