"""Where mask nodes sit, and which rows of which tensors each one governs: one table, matched by names.

A *site* is the input of an output projection: the concatenated heads before the attention's, the
intermediate activations before the FFN's. A row of the table names that projection and the projections
that feed it, relative to a common prefix. A site exists wherever a model has all of them under one
prefix; no list of architectures is needed, and a new one is at most a new row.

The pre-pass and the merge meet here (and in the sidecar), so they cannot disagree about what a node owns.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Kind = Literal["attention", "ffn"]
Node = Literal["head_fisher", "kv_head_fisher", "neuron_fisher"]
Layout = Literal["q", "k", "q k v", "(q k v)", "(k v)", "n", "n n", "(n n)", "mean"]
"""What the rows of a governed tensor are, in order: of query heads (q), key heads (k), value heads (v),
neurons (n); in parentheses, repeated for every key-value head or every neuron. ``mean``: no node of its own."""


@dataclass(frozen=True)
class TableRow:
    """One way to name a site. Paths are relative to the prefix that all of them share.

    Attributes:
        kind: ``attention`` or ``ffn``.
        out: The output projection; its input is what the mask multiplies.
        inputs: Projections whose rows the mask nodes govern. Attention: with their layouts. FFN: the one that
            the activation function is applied to comes first; their layout follows from their shape.
        rest: The block's other tensors but the output projection, which ``unmasked: layer`` weights by the
            site's mean Fisher, as the paper's released code does; an attention's value projection first. A
            leading ``/`` is relative to the layer (``...layers.3.``).
        unless: A parameter that says that this is something else under the same names.
    """

    kind: Kind
    out: str
    inputs: Mapping[str, Layout]
    rest: tuple[str, ...] = ()
    unless: str = ""


def _ffn(out: str, *inputs: str, rest: tuple[str, ...] = ()) -> TableRow:
    return TableRow("ffn", out, dict.fromkeys(inputs, "n"), rest)


def _attention(out: str, inputs: Mapping[str, Layout], *rest: str) -> TableRow:
    return TableRow("attention", out, inputs, rest)


# Where two rows fit the same projection, the first holds.
TABLE = (
    # DiffLlama's heads are differences of two others'.
    TableRow("attention", "o_proj", {"q_proj": "q", "k_proj": "k"}, ("v_proj",), unless="lambda_q1"),
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


class GovernedTensor(BaseModel):
    """A tensor and what its rows are weighted by.

    Attributes:
        name: The tensor's name, in the checkpoint's files or in the loaded model.
        layout: What the rows are.
        shape: The tensor's shape.
        axis: Along which the rows lie: 0, but 1 where a weight is stored transposed (Conv1D), and 1 or 2
            in experts' tensors ``[E, ...]``.
        expert: Which expert's it is, where a site's experts have tensors of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=512)
    layout: Layout
    shape: tuple[int, ...] = Field(min_length=1, max_length=4)
    axis: int = Field(default=0, ge=0, le=2)
    expert: int | None = Field(default=None, ge=0)


class Site(BaseModel):
    """The mask nodes before one output projection.

    Attributes:
        output: Module path of the output projection; of the parameter, where experts share one.
        kind: ``attention`` or ``ffn``.
        heads: H, attention only.
        kv_heads: K, attention only; each is shared by H / K query heads, consecutive ones.
        head_dim: Width of one head's output, attention only.
        neurons: D, FFN only; of each expert, where there are experts.
        experts: E, 0 where there are none or each is a site of its own.
        inputs: Module (or parameter) paths of the projections that feed the site, in the table's order.
        tensors: The governed tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field(min_length=1, max_length=512)
    kind: Kind
    heads: int = Field(default=0, ge=0)
    kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    neurons: int = Field(default=0, ge=0)
    experts: int = Field(default=0, ge=0)
    inputs: tuple[str, ...]
    tensors: tuple[GovernedTensor, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Site":
        ffn = self.kind == "ffn"
        if any((count > 0) == ffn for count in (self.heads, self.kv_heads, self.head_dim)):
            raise ValueError("an attention site, and no other, has heads, kv_heads and head_dim")
        if (self.neurons > 0) != ffn or (self.experts > 0 and not ffn):
            raise ValueError("an FFN site, and no other, has neurons and may have experts")
        if not ffn and self.heads % self.kv_heads:
            raise ValueError("kv_heads must divide heads")
        for tensor in self.tensors:
            if not self._governs(tensor):
                raise ValueError(f"tensor '{tensor.name:.100}' does not divide among the site's nodes")
        return self

    def _governs(self, tensor: GovernedTensor) -> bool:
        if tensor.layout == "mean":
            return True
        if tensor.axis >= len(tensor.shape) or (tensor.expert or 0) >= max(self.experts, 1):
            return False
        rows = tensor.shape[tensor.axis]
        if self.kind == "ffn":
            whole = self.experts == 0 or tensor.expert is not None
            fits = whole or (tensor.axis > 0 and tensor.shape[0] == self.experts)
            return fits and {"n": rows, "n n": rows / 2, "(n n)": rows / 2}.get(tensor.layout) == self.neurons
        if tensor.layout == "(k v)":
            return rows % self.kv_heads == 0 and rows // self.kv_heads > self.head_dim
        parts = {"q": self.heads, "k": self.kv_heads}
        fused = self.heads + 2 * self.kv_heads
        parts |= {"q k v": fused, "(q k v)": fused}
        return tensor.layout in parts and rows > 0 and rows % parts[tensor.layout] == 0

    def nodes(self) -> dict[Node, tuple[int, ...]]:
        """The kinds of Fisher vector this site has, and their shapes."""
        if self.kind == "ffn":
            return {"neuron_fisher": (self.experts, self.neurons) if self.experts else (self.neurons,)}
        return {"head_fisher": (self.heads,), "kv_head_fisher": (self.kv_heads,)}

    def activated(self, values: Tensor) -> Tensor:
        """Of gate and up in one, ``[..., 2 D]``, what the activation is applied to, ``[..., D]``."""
        if values.shape[-1] == self.neurons:
            return values
        return values[..., 0::2] if self._first.layout == "(n n)" else values[..., : self.neurons]

    def model_axis(self, path: str) -> int:
        """The axis of an experts' weight that is not the neurons'."""
        return self._first.axis if path == self.output else 3 - self._first.axis

    @property
    def _first(self) -> GovernedTensor:
        names = self.inputs[0], f"{self.inputs[0]}.weight"
        return next(tensor for tensor in self.tensors if tensor.name in names)


def find_sites(
    shapes: Mapping[str, tuple[int, ...]],
    heads: int | Callable[[str], int],
    *,
    transposed: Collection[str] = (),
    model_type: str = "",
) -> tuple[Site, ...]:
    """Find every site of a model.

    Args:
        shapes: Tensor names and shapes, of a loaded model or of a checkpoint's files.
        heads: H, the number of query heads, or what gives it for an output projection's path. All other
            counts follow from the shapes.
        transposed: Names of the weights that are stored ``[in, out]``.
        model_type: The configuration's; it decides the layouts that neither names nor shapes tell.

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
            if len(shape) not in (2, 3) or (path == name and len(shape) == 2):
                continue  # Only experts are parameters without a module.
            match = _Match(row, prefix, shapes, transposed, model_type)
            if all(map(match.tensors, row.inputs)) and f"{prefix}{row.unless}" not in shapes:
                site = match.ffn() if row.kind == "ffn" else match.attention(heads)
                found |= {path: site} if site else {}
    return tuple(sorted(found.values(), key=_reading_order))


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
        width = self._columns(self.tensors(self.row.out)[0])
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
        out, first = self.tensors(self.row.out)[0], self.tensors(next(iter(self.row.inputs)))[0]
        neurons = self._columns(out)
        layouts: dict[str, Layout] = {}
        for index, path in enumerate(self.row.inputs):
            rows = self._rows(index)
            if rows not in (neurons, 2 * neurons):
                return None
            # GPT-OSS is told by its experts' bias.
            interleaved = self.model_type == "phi3small" or f"{self.prefix}{path}_bias" in self.shapes
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
        rest: dict[str, Layout] = dict.fromkeys((*self.row.rest, self.row.out), "mean")
        return tuple(
            GovernedTensor(
                name=name,
                layout=fused if fused and "q k v" in layout else layout,
                shape=tuple(self.shapes[name]),
                axis=self._axis(name),
            )
            for path, layout in {**layouts, **rest}.items()
            for name in self.tensors(path)
        )

    def _kv_heads(self, heads: int, head_dim: int) -> int:
        """From the number of rows of values, or, where there is no such projection, of keys."""
        path, layout = list(self.row.inputs.items())[-1]
        if layout == "(k v)":
            return heads
        fused = next((part for part, kind in self.row.inputs.items() if "q k v" in kind), None)
        values = self.tensors(self.row.rest[0]) if self.row.rest else []
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

    def _columns(self, out: str) -> int:
        """Width of what enters the output projection."""
        shape = self.shapes[out]
        return shape[-1 - self._axis(out)] if len(shape) == 2 else shape[3 - self._expert_axis()]

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


def stack_of(output: str) -> str:
    """What comes before the first number of a path: ``model.layers``, ``vision_tower.encoder.layers``."""
    parts = output.split(".")
    return next((".".join(parts[:index]) for index, part in enumerate(parts) if part.isdigit()), "")


def _reading_order(site: Site) -> tuple[str, list[int], str, str]:
    """Stack by stack, layer by layer, attention before FFN."""
    numbers = [int(part) for part in site.output.split(".") if part.isdigit()]
    return stack_of(site.output), numbers, site.kind, site.output


def name_template(name: str) -> str:
    """A tensor's name with its layer numbers left out: what tensors of different layers have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def row_fisher(site: Site, tensor: GovernedTensor, fisher: Mapping[Node, Tensor], plain: Tensor) -> Tensor:
    """Fisher information of each row of a governed tensor.

    Args:
        site: The tensor's site.
        tensor: A governed tensor with a layout other than ``mean``.
        fisher: The site's Fisher vectors, ``head_fisher [H]`` and ``kv_head_fisher [K]``, or
            ``neuron_fisher [D]`` (``[E, D]`` for experts).
        plain: For rows that no mask node governs (values), ``[1]``.

    Returns:
        As many dimensions as the tensor has, 1 along those where nothing changes: for ``q``, row r gets the
        Fisher of head r // (rows / H), and so on.
    """
    rows, groups = tensor.shape[tensor.axis], site.kv_heads
    if site.kind == "ffn":
        neurons = fisher["neuron_fisher"]
        if tensor.expert is not None:
            neurons = neurons[tensor.expert]
        if tensor.layout == "n n":
            neurons = torch.cat([neurons, neurons], -1)
        elif tensor.layout == "(n n)":
            neurons = neurons.repeat_interleave(2, -1)
        wide = [*neurons.shape[:-1], *[1] * (len(tensor.shape) - neurons.ndim), neurons.shape[-1]]
        return neurons.reshape(wide).transpose(tensor.axis, -1)
    heads, keys = fisher["head_fisher"], fisher["kv_head_fisher"]
    if tensor.layout == "q":
        vector = heads.repeat_interleave(rows // site.heads)
    elif tensor.layout == "k":
        vector = keys.repeat_interleave(rows // groups)
    elif tensor.layout == "(k v)":
        key_rows = keys[:, None].expand(-1, rows // groups - site.head_dim)
        vector = torch.cat([key_rows, plain.expand(groups, site.head_dim)], 1).flatten()
    else:
        width = rows // (site.heads + 2 * groups)
        query_rows = heads.reshape(groups, -1).repeat_interleave(width, 1)
        parts = [query_rows, keys[:, None].expand(-1, width), plain.expand(groups, width)]
        grouped = tensor.layout == "(q k v)"
        vector = torch.cat(parts, 1).flatten() if grouped else torch.cat([part.flatten() for part in parts])
    shape = [1] * len(tensor.shape)
    shape[tensor.axis] = rows
    return vector.reshape(shape)


def sum_over_groups(head_gradients: Tensor, kv_heads: int) -> Tensor:
    """Per-sample gradient of the mask that a key-value head's query heads share, ``[B, H] -> [B, K]``.

    It is the sum of the heads' gradients; its square is not the sum of their squares.
    """
    return head_gradients.unflatten(-1, (kv_heads, -1)).sum(-1)
