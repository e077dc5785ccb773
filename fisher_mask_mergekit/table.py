"""Where mask nodes sit: one table, matched by names.

A *site* is the input of an output projection: the concatenated heads before the attention's, the
intermediate activations before the FFN's. A row of the table names that projection and the projections
that feed it, relative to a common prefix. A site exists wherever a model has all of them under one
prefix; no list of architectures is needed, and a new one is at most a new row.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fisher_mask_mergekit.sites import GovernedTensor, Kind, Layout, Site, stack_of


@dataclass(frozen=True)
class TableRow:
    """One way to name a site. Paths are relative to the prefix that all of them share.

    Attributes:
        kind: ``attention`` or ``ffn``.
        out: The output projection; its input is what the mask multiplies.
        inputs: Projections whose rows the mask nodes govern. Attention: with their layouts, but for the values'.
            FFN: the one that the activation function is applied to comes first; their layout follows from their
            shape.
        value: An attention's value projection, or its bias, where it has tensors of its own.
        rest: The block's other tensors, which ``unmasked: layer`` weights by the site's mean Fisher, as the paper's
            released code does. A leading ``/`` is relative to the layer (``...layers.3.``).
        unless: A parameter that says that this is something else under the same names.
    """

    kind: Kind
    out: str
    inputs: Mapping[str, Layout]
    value: str = ""
    rest: tuple[str, ...] = ()
    unless: str = ""


def _ffn(out: str, *inputs: str, rest: tuple[str, ...] = ()) -> TableRow:
    return TableRow("ffn", out, dict.fromkeys(inputs, "n"), rest=rest)


def _attention(out: str, inputs: Mapping[str, Layout], value: str = "", *rest: str) -> TableRow:
    return TableRow("attention", out, inputs, value, rest)


# Where two rows fit the same projection, the first holds.
TABLE = (
    # DiffLlama's heads are differences of two others'.
    TableRow("attention", "o_proj", {"q_proj": "q", "k_proj": "k"}, "v_proj", unless="lambda_q1"),
    _attention("o_proj", {"q_b_proj": "q", "kv_b_proj": "(k v)"}),  # DeepSeek's latent attention
    _attention("o_proj", {"q_proj": "q", "kv_b_proj": "(k v)"}),
    _attention("o_proj", {"qkv_proj": "q k v"}),  # Phi-3
    _attention("o_proj", {"W_pack": "q k v"}),  # Baichuan
    _attention(
        "attention.output.dense",
        {"attention.self.query": "q", "attention.self.key": "k"},
        "attention.self.value",
        "attention.output.LayerNorm",
    ),
    _attention(
        "attention.output.dense",  # DeBERTa-v2, v3
        {"attention.self.query_proj": "q", "attention.self.key_proj": "k"},
        "attention.self.value_proj",
        "attention.output.LayerNorm",
    ),
    _attention(
        "attention.output.dense",  # DeBERTa
        {"attention.self.in_proj": "(q k v)", "attention.self.q_bias": "q"},
        "attention.self.v_bias",
        "attention.output.LayerNorm",
    ),
    _attention("out_lin", {"q_lin": "q", "k_lin": "k"}, "v_lin", "/sa_layer_norm"),
    _attention("out_proj", {"q_proj": "q", "k_proj": "k"}, "v_proj"),
    _attention("out_proj", {"Wqkv": "q k v"}),  # MPT, NomicBERT
    _attention("Wo", {"Wqkv": "q k v"}),  # ModernBERT
    _attention("dense", {"q_proj": "q", "k_proj": "k"}, "v_proj"),  # Phi-2
    _attention("dense", {"query": "q", "key": "k"}, "value", "LayerNorm"),  # ALBERT
    _attention("dense", {"query_key_value": "(q k v)"}),  # GPT-NeoX, Falcon, BLOOM
    _attention("c_proj", {"c_attn": "q k v"}),  # GPT-2
    _attention("o", {"q": "q", "k": "k"}, "v"),  # T5, MPNet
    _attention("wo", {"wqkv": "(q k v)"}),  # InternLM2
    _attention("proj", {"qkv": "q k v"}),  # vision towers
    _ffn("down_proj", "gate_proj", "up_proj"),
    _ffn("down_proj", "gate_up_proj"),  # gate and up in one; also experts in one
    _ffn("down_proj", "up_proj"),
    _ffn("output.dense", "intermediate.dense", rest=("output.LayerNorm",)),
    _ffn("fc2", "fc12", "fc11"),  # NomicBERT
    _ffn("fc2", "fc1"),
    _ffn("lin2", "lin1", rest=("/output_layer_norm",)),
    _ffn("c_proj", "c_fc2", "c_fc"),  # Jais
    _ffn("c_proj", "c_fc_0", "c_fc_1"),  # EXAONE 3
    _ffn("c_proj", "w2", "w1"),  # Qwen 1
    _ffn("c_proj", "c_fc"),
    _ffn("dense_4h_to_h", "dense_h_to_4h"),
    _ffn("w2", "w1", "w3"),
    _ffn("linear_fc2", "linear_fc1"),
    _ffn("wo", "wi_0", "wi_1"),
    _ffn("wo", "wi"),
    _ffn("output_linear", "input_linear"),  # Granite, also experts in one
    _ffn("Wo", "Wi"),
    _ffn("fc_out", "fc_in"),
    _ffn("ffn_output", "ffn", rest=("/full_layer_layer_norm",)),
)


def find_sites(
    shapes: Mapping[str, tuple[int, ...]],
    heads: int | Callable[[str], int],
    *,
    transposed: Collection[str] = (),
    model_type: str | Callable[[str], str] = "",
) -> tuple[Site, ...]:
    """Find every site of a model.

    Args:
        shapes: Tensor names and shapes, of a loaded model or of a checkpoint's files.
        heads: H, the number of query heads, or what gives it for an output projection's path. All other
            counts follow from the shapes.
        transposed: Names of the weights that are stored ``[in, out]``.
        model_type: The configuration's, or what gives that of an output projection's path; it decides the
            layouts that neither names nor shapes tell.

    Returns:
        The sites, stack by stack, layer by layer, attention before FFN.

    Raises:
        ValueError: If a projection's rows cannot be divided among the heads (names the tensor).
    """
    found: dict[str, Site] = {}
    for row in TABLE:
        for name, shape in shapes.items():
            path = name.removesuffix(".weight")
            prefix = path.removesuffix(row.out)
            if path in found or prefix == path or (prefix and not prefix.endswith(".")):
                continue
            if len(shape) not in ((2,) if row.kind == "attention" else (2, 3)) or (
                path == name and len(shape) == 2
            ):
                continue  # Only experts are parameters without a module.
            kind = model_type if isinstance(model_type, str) else model_type(path)
            match = _Match(row, prefix, shapes, transposed, kind)
            if all(map(match.tensors, row.inputs)) and f"{prefix}{row.unless}" not in shapes:
                site = match.ffn() if row.kind == "ffn" else match.attention(heads)
                found |= {path: site} if site else {}
    return tuple(sorted(found.values(), key=_reading_order))


_INTERLEAVED = ("phi3small", "gpt_oss")
"""Where gate and up rows lie in turn: others with the same names and shapes have one after the other."""


@dataclass(frozen=True)
class _Match:
    """A row of the table that fits under a prefix."""

    row: TableRow
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Collection[str]
    model_type: str

    def tensors(self, path: str) -> list[str]:
        """The tensors of a module, or a parameter itself with its bias; the weight first."""
        path = _resolve(path, self.prefix)
        names = f"{path}.weight", path, f"{path}.bias", f"{path}_bias"
        return [name for name in names if name in self.shapes]

    def attention(self, heads: int | Callable[[str], int]) -> Site:
        output = self.prefix + self.row.out
        count = heads if isinstance(heads, int) else heads(output)
        width = self._columns()
        first = self.tensors(next(iter(self.row.inputs)))[0]
        try:
            if count < 1 or width % count:
                raise ValueError(f"{output} takes {width} columns")
            # A head's width is that of its output; a query projection may hold more rows per head (a gate).
            head_dim = width // count
            return Site(
                output=output,
                kind="attention",
                heads=count,
                kv_heads=self._kv_heads(count, head_dim),
                head_dim=head_dim,
                inputs=tuple(self.prefix + path for path in self.row.inputs),
                tensors=self._governed(self.row.inputs),
            )
        except ValueError as error:
            raise ValueError(
                f"{first} has {self._rows(0)} rows: they do not divide among {count} heads"
            ) from error

    def ffn(self) -> Site | None:
        """None if the projections' shapes do not fit each other."""
        first = self.tensors(next(iter(self.row.inputs)))[0]
        neurons = self._columns()
        layouts: dict[str, Layout] = {}
        for index, path in enumerate(self.row.inputs):
            rows = self._rows(index)
            if rows not in (neurons, 2 * neurons):
                return None
            interleaved = self.model_type in _INTERLEAVED
            layouts[path] = "n" if rows == neurons else "(n n)" if interleaved else "n n"
        return Site(
            output=self.prefix + self.row.out,
            kind="ffn",
            neurons=neurons,
            experts=self.shapes[first][0] if len(self.shapes[first]) == 3 else 0,
            inputs=tuple(self.prefix + path for path in self.row.inputs),
            tensors=self._governed(layouts),
        )

    def _governed(self, layouts: Mapping[str, Layout]) -> tuple[GovernedTensor, ...]:
        fused: Layout | None = {"gpt_bigcode": "(q k v)", "chatglm": "q k v"}.get(self.model_type)  # type: ignore[assignment]
        value: dict[str, Layout] = {self.row.value: "v"} if self.row.value else {}
        rest: dict[str, Layout] = dict.fromkeys((*self.row.rest, self.row.out), "mean")
        output = self.tensors(self.row.out)[0]
        columns: Layout = "columns n" if self.row.kind == "ffn" else "columns h"
        found = [
            (name, fused if fused and "q k v" in layout else layout, self._axis(name))
            for path, layout in {**layouts, **value, **rest}.items()
            for name in self.tensors(path)
            if name != output
        ]
        return tuple(
            GovernedTensor(name=name, layout=layout, shape=tuple(self.shapes[name]), axis=axis)
            for name, layout, axis in [*found, (output, columns, self._column_axis())]
        )

    def _kv_heads(self, heads: int, head_dim: int) -> int:
        """From the number of rows of values, or, where there is no such projection, of keys."""
        path, layout = list(self.row.inputs.items())[-1]
        if layout == "(k v)":
            return heads
        fused = next((part for part, kind in self.row.inputs.items() if "q k v" in kind), None)
        values = self.tensors(self.row.value) if self.row.value else []
        name = self.tensors(fused)[0] if fused else values[0] if values else self.tensors(path)[0]
        rows = self.shapes[name][self._axis(name)]
        kv_heads = (rows // head_dim - heads) // 2 if fused else rows // head_dim
        # A query and a key of one head are as long, or the query has a gate besides.
        if (
            rows % head_dim
            or kv_heads < 1
            or (not fused and self._rows(0) * kv_heads % (self._rows(1) * heads))
        ):
            raise ValueError(f"{name} has {rows} rows")
        return kv_heads

    def _rows(self, index: int) -> int:
        """Of one of the inputs' weights."""
        name = self.tensors(list(self.row.inputs)[index])[0]
        return self.shapes[name][self._axis(name)]

    def _columns(self) -> int:
        """Width of what enters the output projection."""
        return self.shapes[self.tensors(self.row.out)[0]][self._column_axis()]

    def _column_axis(self) -> int:
        """Along which the inputs of the output projection lie."""
        out = self.tensors(self.row.out)[0]
        return 3 - self._expert_axis() if len(self.shapes[out]) == 3 else 1 - self._axis(out)

    def _axis(self, name: str) -> int:
        """Along which the outputs of a projection lie."""
        if len(self.shapes[name]) == 3:
            return self._expert_axis()
        stacked_bias = name.endswith("_bias") and len(self.shapes[name]) == 2
        return 1 if name in self.transposed or stacked_bias else 0

    def _expert_axis(self) -> int:
        """1 for experts' tensors ``[E, out, in]``, 2 for ``[E, in, out]``: only one fits both projections."""
        first = self.shapes[self.tensors(next(iter(self.row.inputs)))[0]]
        out = self.shapes[self.tensors(self.row.out)[0]]
        straight = first[-1] == out[-2] and first[-2] in (out[-1], 2 * out[-1])
        return 1 if straight else 2


def _resolve(path: str, prefix: str) -> str:
    """A path of the table as a module path; ``/x`` stands beside the prefix's last numbered part."""
    if not path.startswith("/"):
        return prefix + path
    parts = prefix.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join([*parts[: last + 1], path[1:]])


def _reading_order(site: Site) -> tuple[str, list[int], str, str]:
    """Stack by stack, layer by layer, attention before FFN."""
    numbers = [int(part) for part in site.output.split(".") if part.isdigit()]
    return stack_of(site.output), numbers, site.kind, site.output
