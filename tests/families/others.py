"""Encoder-decoders, and models with a vision tower."""

from tests.families.decoders import ALTERNATING, LLAMA, MHA, WIDE
from tests.families.experts import FOUR, LOCAL
from tests.families.family import (
    HIDDEN,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    NEURONS,
    PAD,
    VIDEO,
    VOCABULARY,
    Fails,
    Family,
    Loses,
    requires,
)

T5 = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 12, "d_ff": NEURONS, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "feed_forward_proj": "relu", "pad_token_id": PAD, "decoder_start_token_id": PAD,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# The decoder's attention has other heads than the encoder's.
BART = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": NEURONS, "decoder_ffn_dim": 40,
    "max_position_embeddings": 40, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
WHISPER = {name: value for name, value in BART.items() if name not in ("max_position_embeddings", "forced_eos_token_id")} | {
    "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "suppress_tokens": [],
    "begin_suppress_tokens": [],
}  # fmt: skip
ENCODER_DECODER = (("decoder", 2, 2), ("", 4, 4))

TOWER = {
    "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2,
    "num_heads": 3,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
GEMMA3 = {
    "text_config": WIDE | ALTERNATING | {"query_pre_attn_scalar": 12}, "vision_config": TOWER,
    "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END,
}  # fmt: skip
MISTRAL3 = {
    "text_config": WIDE | {"model_type": "mistral"}, "vision_config": TOWER | {"model_type": "pixtral"},
    "image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA4 = {
    "text_config": WIDE | LOCAL | {"intermediate_size_mlp": NEURONS, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    # What the pixel shuffle puts out (24 x 4) has to be as wide as the tower's FFN.
    "vision_config": TOWER
    | {"intermediate_size": 96, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20},
    "image_token_index": IMAGE, "boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
MROPE_WIDE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
QWEN2_VL = QWEN_IDS | {
    "text_config": LLAMA | MROPE, "vision_config": QWEN_TOWER | {"embed_dim": 24, "hidden_size": HIDDEN, "mlp_ratio": 2},
}  # fmt: skip
QWEN25_VL = QWEN_IDS | {
    "text_config": LLAMA | MROPE,
    "vision_config": QWEN_TOWER
    | {"hidden_size": 24, "intermediate_size": 44, "out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1]},
}  # fmt: skip
# mergekit's file wants three deep-stack mergers; the text layers after which they act must be there.
QWEN3_TOWER = QWEN_TOWER | {
    "depth": 3, "hidden_size": 24, "intermediate_size": 44, "out_hidden_size": HIDDEN, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}  # fmt: skip
QWEN3_VL = QWEN_IDS | {
    "text_config": WIDE | MROPE_WIDE | {"num_hidden_layers": 3},
    "vision_config": QWEN3_TOWER,
}
QWEN3_VL_MOE = QWEN_IDS | {
    "text_config": WIDE | FOUR | MROPE_WIDE | {"num_hidden_layers": 3},
    "vision_config": QWEN3_TOWER,
}
VISION, VISUAL = (("vision", 3, 3), ("", 4, 2)), (("visual", 3, 3), ("", 4, 2))

ENCODER_DECODERS = (
    Family("t5-v1.0", "T5ForConditionalGeneration", T5, "seq2seq", "t5", MHA, merge=requires("decoder.block.0.layer.2.DenseReluDense.wi_0.weight")),
    Family("t5-v1.1", "T5ForConditionalGeneration", T5 | GATED, "seq2seq", "t5", MHA),
    Family("whisper", "WhisperForConditionalGeneration", WHISPER, "audio", "whisper", ENCODER_DECODER, merge=requires("model.decoderembed_tokens.weight")),
    # Inferred.
    Family("mt5", "MT5ForConditionalGeneration", T5 | GATED, "seq2seq", heads=MHA),
    Family("t5-encoder", "T5EncoderModel", T5 | GATED, heads=MHA),
    Family("bart", "BartForConditionalGeneration", BART, "seq2seq", heads=ENCODER_DECODER),
)  # fmt: skip
TOWERS = (
    Family("gemma3-vl", "Gemma3ForConditionalGeneration", GEMMA3, "text and pixels", "gemma3vl", VISION, merge=requires("vision_tower.vision_model.embeddings.patch_embedding.bias")),
    Family("mistral3", "Mistral3ForConditionalGeneration", MISTRAL3, "text and sized pixels", "mistral3", VISION),
    Family("llama4", "Llama4ForConditionalGeneration", LLAMA4, "text and pixels", "llama4", VISION),
    Family("qwen2-vl", "Qwen2VLForConditionalGeneration", QWEN2_VL, "text and patches", "qwen2_vl", VISUAL, merge=Fails("RuntimeError", "has no attribute num_hidden_layers")),
    Family("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", QWEN25_VL, "text and patches", "qwen2_5_vl", VISUAL),
    Family("qwen3-vl", "Qwen3VLForConditionalGeneration", QWEN3_VL, "text and patches", "qwen3_vl_dense", VISUAL),
    Family("qwen3-vl-moe", "Qwen3VLMoeForConditionalGeneration", QWEN3_VL_MOE, "text and patches", "qwen3_vl", VISUAL),
    # Inferred. It reads text only, but has the tower's weights.
    Family("gemma3-sequence", "Gemma3ForSequenceClassification", GEMMA3 | {"num_labels": 3}, heads=VISION, merge=Loses(("model.language_model.",))),
)  # fmt: skip
