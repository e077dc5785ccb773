"""Architectures that mergekit knows, but whose code is not in transformers: the tensors they would have."""

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]

# As in the other tables: hidden size 32, 4 heads of 8, FFN 56 wide, 64 words.
_H, _I, _V = 32, 56, 64
_MHA, _GQA = 3 * _H, _H + 2 * 16
_SEPARATE = {"q_proj.weight": (_H, _H), "k_proj.weight": (16, _H), "v_proj.weight": (16, _H)}
_GATED_MLP = {
    "mlp.gate_proj.weight": (_I, _H),
    "mlp.up_proj.weight": (_I, _H),
    "mlp.down_proj.weight": (_H, _I),
}


@dataclass(frozen=True)
class Remote:
    """The tensors of two layers, by name.

    Attributes:
        name: mergekit's architecture file, unique.
        prefix: What every tensor of a layer begins with; ``{}`` is its number.
        attention: The attention's tensors, relative to ``prefix``. Likewise ``ffn`` and ``rest``.
        others: Tensors outside the layers.
        out: The attention's and the FFN's output projection, relative to ``prefix``.
        heads: Query and key-value heads.
        layout: How queries and keys are stored: ``separate``; ``blocks``, all queries, all keys, all
            values; ``grouped``, each key-value head's queries, its key, its value.
        conv1d: Weights are stored ``[in, out]``.
        interleaved: Gate and up row of a neuron follow one another in one tensor.
        first: Number of the first layer.
        neurons: Width of the FFN.
    """

    name: str
    prefix: str
    attention: Mapping[str, Shape]
    ffn: Mapping[str, Shape]
    rest: Mapping[str, Shape]
    others: Mapping[str, Shape]
    out: tuple[str, str]
    heads: tuple[int, int] = (4, 4)
    layout: str = "separate"
    conv1d: bool = False
    interleaved: bool = False
    first: int = 0
    neurons: int = _I

    def __str__(self) -> str:
        return self.name

    @property
    def layers(self) -> tuple[int, int]:
        return self.first, self.first + 1

    @property
    def tensors(self) -> dict[str, Shape]:
        layer = {**self.attention, **self.ffn, **self.rest}
        every = {
            self.prefix.format(index) + name: shape for index in self.layers for name, shape in layer.items()
        }
        return every | dict(self.others)


def _below(path: str, tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{path}.{name}": shape for name, shape in tensors.items()}


def _linear(path: str, rows: int, columns: int, conv1d: bool = False) -> dict[str, Shape]:
    """Weight and bias."""
    return {f"{path}.weight": (columns, rows) if conv1d else (rows, columns), f"{path}.bias": (rows,)}


def _norms(*paths: str, bias: bool = False) -> dict[str, Shape]:
    return {
        f"{path}.{kind}": (_H,) for path in paths for kind in (("weight", "bias") if bias else ("weight",))
    }


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_LLAMA_OTHERS = {"model.embed_tokens.weight": (_V, _H), "lm_head.weight": (_V, _H)} | _norms("model.norm")
_GPT_OTHERS = {"transformer.wte.weight": (_V, _H), "lm_head.weight": (_V, _H)} | _norms("transformer.ln_f")
_PHI_ATTENTION = _linear("mixer.Wqkv", _MHA, _H) | _linear("mixer.out_proj", _H, _H)
_PHI_FFN = _linear("mlp.fc1", _I, _H) | _linear("mlp.fc2", _H, _I)

REMOTE = (
    Remote(
        "baichuan", "model.layers.{}.",
        attention={"self_attn.W_pack.weight": (_MHA, _H), "self_attn.o_proj.weight": (_H, _H)},
        ffn=_GATED_MLP, rest=_norms(*_LLAMA_NORMS), others=_LLAMA_OTHERS,
        out=("self_attn.o_proj", "mlp.down_proj"), layout="blocks",
    ),
    Remote(
        "chatglm", "transformer.encoder.layers.{}.",
        attention=_linear("self_attention.query_key_value", _GQA, _H) | {"self_attention.dense.weight": (_H, _H)},
        ffn={"mlp.dense_h_to_4h.weight": (2 * _I, _H), "mlp.dense_4h_to_h.weight": (_H, _I)},
        rest=_norms(*_LLAMA_NORMS),
        others={
            "transformer.embedding.word_embeddings.weight": (_V, _H), "transformer.rotary_pos_emb.inv_freq": (2,),
            "transformer.output_layer.weight": (_V, _H),
        } | _norms("transformer.encoder.final_layernorm"),
        out=("self_attention.dense", "mlp.dense_4h_to_h"), heads=(4, 2), layout="blocks",
    ),
    Remote(
        "exaone", "transformer.h.{}.",
        attention=_below("attn.attention", _SEPARATE | {"out_proj.weight": (_H, _H)}),
        ffn={"mlp.c_fc_0.weight": (_I, _H), "mlp.c_fc_1.weight": (_I, _H), "mlp.c_proj.weight": (_H, _I)},
        rest=_norms("ln_1", "ln_2"), others=_GPT_OTHERS,
        out=("attn.attention.out_proj", "mlp.c_proj"), heads=(4, 2),
    ),
    Remote(
        "internlm2", "model.layers.{}.",
        attention={"attention.wqkv.weight": (_GQA, _H), "attention.wo.weight": (_H, _H)},
        ffn=_below("feed_forward", {"w1.weight": (_I, _H), "w3.weight": (_I, _H), "w2.weight": (_H, _I)}),
        rest=_norms("attention_norm", "ffn_norm"),
        others={"model.tok_embeddings.weight": (_V, _H), "output.weight": (_V, _H)} | _norms("model.norm"),
        out=("attention.wo", "feed_forward.w2"), heads=(4, 2), layout="grouped",
    ),
    Remote(
        "jais", "transformer.h.{}.",
        attention=_linear("attn.c_attn", _MHA, _H, True) | _linear("attn.c_proj", _H, _H, True),
        ffn=_linear("mlp.c_fc", _I, _H, True) | _linear("mlp.c_fc2", _I, _H, True) | _linear("mlp.c_proj", _H, _I, True),
        rest=_norms("ln_1", "ln_2", bias=True),
        others={"transformer.wte.weight": (_V, _H), "transformer.relative_pe.slopes": (4,)}
        | _norms("transformer.ln_f", bias=True),
        out=("attn.c_proj", "mlp.c_proj"), layout="blocks", conv1d=True,
    ),
    # The embedding is layer 0, so the blocks begin at 1; mergekit's file has them begin at 0.
    Remote(
        "phi-1", "layers.{}.",
        attention=_PHI_ATTENTION, ffn=_PHI_FFN, out=("mixer.out_proj", "mlp.fc2"), layout="blocks",
        rest=_norms("ln", bias=True) | {"mixer.rotary_emb.inv_freq": (2,)}, first=1,
        others={"layers.0.wte.weight": (_V, _H)} | _linear("layers.3.linear", _V, _H) | _norms("layers.3.ln", bias=True),
    ),
    Remote(
        "phi2-old", "transformer.h.{}.",
        attention=_PHI_ATTENTION, ffn=_PHI_FFN, out=("mixer.out_proj", "mlp.fc2"), layout="blocks",
        rest=_norms("ln", bias=True),
        others={"transformer.embd.wte.weight": (_V, _H)} | _linear("lm_head.linear", _V, _H) | _norms("lm_head.ln", bias=True),
    ),
    Remote(
        "phi3-small", "model.layers.{}.",
        attention=_linear("self_attn.query_key_value", _GQA, _H) | _linear("self_attn.dense", _H, _H),
        ffn=_linear("mlp.up_proj", 2 * _I, _H) | _linear("mlp.down_proj", _H, _I),
        rest=_norms(*_LLAMA_NORMS, bias=True),
        others={"model.embed_tokens.weight": (_V, _H), "lm_head.weight": (_V, _H)} | _norms("model.final_layernorm", bias=True),
        out=("self_attn.dense", "mlp.down_proj"), heads=(4, 2), layout="grouped", interleaved=True,
    ),
    Remote(
        "qwen", "transformer.h.{}.",
        attention=_linear("attn.c_attn", _MHA, _H) | {"attn.c_proj.weight": (_H, _H)},
        ffn={"mlp.w1.weight": (_I, _H), "mlp.w2.weight": (_I, _H), "mlp.c_proj.weight": (_H, _I)},
        rest=_norms("ln_1", "ln_2"), others=_GPT_OTHERS,
        out=("attn.c_proj", "mlp.c_proj"), layout="blocks",
    ),
    Remote(
        "solar", "model.layers.{}.",
        attention=_below("self_attn", _SEPARATE | {"o_proj.weight": (_H, _H)}),
        ffn=_GATED_MLP, rest=_norms(*_LLAMA_NORMS), others=_LLAMA_OTHERS,
        out=("self_attn.o_proj", "mlp.down_proj"), heads=(4, 2),
    ),
    Remote(
        "stablelm", "model.layers.{}.",
        attention=_below("self_attn", _SEPARATE | {"o_proj.weight": (_H, _H)}),
        ffn=_GATED_MLP, rest=_norms(*_LLAMA_NORMS, bias=True), others=_LLAMA_OTHERS,
        out=("self_attn.o_proj", "mlp.down_proj"), heads=(4, 2),
    ),
)  # fmt: skip
