"""The table of sites against architectures written out by hand."""

import pytest

from fisher_mask_mergekit.table import find_sites
from tests import tiny

LAYER = {
    "bert": "bert.encoder.layer.1.",
    "distilbert": "distilbert.transformer.layer.1.",
    "llama": "model.layers.1.",
}
LAYER |= {"roberta": "roberta.encoder.layer.1.", "xlm-roberta": "roberta.encoder.layer.1."}
LAYER |= {"electra": "electra.encoder.layer.1.", "qwen2": LAYER["llama"], "mistral": LAYER["llama"]}
ENCODER = {
    "attention.output.dense": ["attention.self.query", "attention.self.key"],
    "output.dense": ["intermediate.dense"],
}
DISTILBERT = {"attention.out_lin": ["attention.q_lin", "attention.k_lin"], "ffn.lin2": ["ffn.lin1"]}
# The activation function is applied to the gate, which therefore comes first.
DECODER = {
    "self_attn.o_proj": ["self_attn.q_proj", "self_attn.k_proj"],
    "mlp.down_proj": ["mlp.gate_proj", "mlp.up_proj"],
}
VALUE: dict[str, str] = {
    "encoder": "attention.self.value",
    "distilbert": "attention.v_lin",
    "decoder": "self_attn.v_proj",
}
REST: dict[str, list[list[str]]] = {
    "encoder": [["attention.output.LayerNorm"], ["output.LayerNorm"]],
    "distilbert": [["sa_layer_norm"], ["output_layer_norm"]],
    "decoder": [[], []],
}  # fmt: skip


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_sites_and_governed_tensors(architecture: str) -> None:
    model = tiny.classifier(architecture)
    layer = LAYER[architecture]
    kind = {"distilbert": "distilbert", "llama": "decoder", "qwen2": "decoder", "mistral": "decoder"}.get(
        architecture, "encoder"
    )
    wanted = {"encoder": ENCODER, "distilbert": DISTILBERT, "decoder": DECODER}[kind]
    attention, ffn = tiny.sites_of(model)[2:]
    for site, output, rest in zip((attention, ffn), wanted, REST[kind], strict=True):
        assert site.output == layer + output
        assert list(site.inputs) == [layer + path for path in wanted[output]]
        rows = ["q", "k"] if site is attention else ["n"] * len(site.inputs)
        layouts = dict(zip(site.inputs, rows, strict=True)) | {layer + path: "mean" for path in rest}
        layouts |= {layer + VALUE[kind]: "v"} if site is attention else {}
        weight, bias = f"{site.output}.weight", f"{site.output}.bias"
        columns = "columns h" if site is attention else "columns n"
        wanted_of = {
            name: {weight: columns, bias: "mean"}.get(name) or layouts[name.rpartition(".")[0]]
            for name, _ in model.named_parameters()
            if name.rpartition(".")[0] in layouts or name in (weight, bias)
        }
        assert {tensor.name: tensor.layout for tensor in site.tensors} == wanted_of
        assert {tensor.axis for tensor in site.tensors if tensor.name == weight} == {1}
    assert (attention.heads, ffn.neurons) == (4, 48)
    assert attention.kv_heads == (2 if kind == "decoder" else 4)


def _attention(query: int, key: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        "l.0.q_proj.weight": (query, 16),
        "l.0.k_proj.weight": (key, 16),
        "l.0.o_proj.weight": (16, width),
    }


def test_the_width_of_a_head_is_that_of_its_output() -> None:
    """A query projection that also holds a gate has twice the rows."""
    (site,) = find_sites(_attention(query=64, key=16, width=32), heads=4)
    assert (site.heads, site.kv_heads) == (4, 2)


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [(_attention(32, 32, 32), 5), (_attention(32, 32, 32), 0), (_attention(32, 12, 32), 4), (_attention(48, 32, 32), 4), (_attention(32, 24, 32), 4)],
)  # fmt: skip
def test_rows_that_do_not_divide_are_refused(shapes: dict[str, tuple[int, ...]], heads: int) -> None:
    with pytest.raises(ValueError, match=r"l\.0\.q_proj\.weight has .* do not divide among"):
        find_sites(shapes, heads)


def test_projections_must_share_their_prefix() -> None:
    shapes = {"a.q_proj.weight": (4, 4), "b.k_proj.weight": (4, 4), "a.o_proj.weight": (4, 4)}
    assert find_sites(shapes, 2) == ()


@pytest.mark.parametrize(("model_type", "layout"), [("gpt_oss", "(n n)"), ("openai_privacy_filter", "n n")])
def test_experts_with_a_bias_are_interleaved_in_gpt_oss_alone(model_type: str, layout: str) -> None:
    shapes = {"e.gate_up_proj": (4, 16, 20), "e.gate_up_proj_bias": (4, 20), "e.down_proj": (4, 10, 16)}
    (site,) = find_sites(shapes, 1, model_type=model_type)
    assert {tensor.layout for tensor in site.tensors} == {layout, "columns n"}
    assert (site.experts, site.neurons) == (4, 10)


def test_a_model_inside_another_is_laid_out_as_its_own_configuration_says() -> None:
    shapes = {
        f"{part}.layers.0.mlp.experts.{name}": shape
        for part in ("language_model", "other")
        for name, shape in {"gate_up_proj": (4, 16, 20), "down_proj": (4, 10, 16)}.items()
    }
    sites = find_sites(
        shapes, 1, model_type=lambda path: "gpt_oss" if path.startswith("language") else "internvl"
    )
    assert [site.tensors[0].layout for site in sites] == ["(n n)", "n n"]
