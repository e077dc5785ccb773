"""Where mask nodes sit, and which rows of which tensors each one governs: one table, matched by names.

A *site* is the input of an output projection: the concatenated heads before the attention's, the
intermediate activations before the FFN's. A row of the table names that projection and the projections
that feed it, relative to a common prefix. A site exists wherever a checkpoint has all of them under one
prefix; no list of architectures is needed, and a new one is at most a new row.

The pre-pass and the merge meet here (and in the sidecar), so they cannot disagree about what a node owns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Kind = Literal["attention", "ffn"]
Rows = Literal["query", "key", "neuron", "mean"]
Node = Literal["head_fisher", "kv_head_fisher", "neuron_fisher"]


@dataclass(frozen=True)
class TableRow:
    """One way to name a site. Paths are relative to the prefix that all of them share.

    Attributes:
        kind: ``attention`` or ``ffn``.
        out: The output projection; its input is what the mask multiplies.
        inputs: Projections whose rows the mask nodes govern. Attention: query, key. FFN: the one that
            the activation function is applied to comes first.
        rest: The block's other tensors, which ``unmasked: layer`` weights by the site's mean Fisher, as
            the paper's released code does. A leading ``/`` is relative to the layer (``...layers.3.``).
    """

    kind: Kind
    out: str
    inputs: tuple[str, ...]
    rest: tuple[str, ...]


TABLE = (
    TableRow("attention", "o_proj", ("q_proj", "k_proj"), ("v_proj", "o_proj")),
    TableRow(
        "attention",
        "attention.output.dense",
        ("attention.self.query", "attention.self.key"),
        ("attention.self.value", "attention.output.dense", "attention.output.LayerNorm"),
    ),
    TableRow("attention", "out_lin", ("q_lin", "k_lin"), ("v_lin", "out_lin", "/sa_layer_norm")),
    TableRow("ffn", "down_proj", ("gate_proj", "up_proj"), ("down_proj",)),
    TableRow("ffn", "output.dense", ("intermediate.dense",), ("output.dense", "output.LayerNorm")),
    TableRow("ffn", "lin2", ("lin1",), ("lin2", "/output_layer_norm")),
)


class GovernedTensor(BaseModel):
    """A checkpoint tensor and what its rows (first axis) are weighted by.

    Attributes:
        name: The tensor's name in the checkpoint.
        rows: ``query``: equal chunks of rows per head; ``key``: per key-value head; ``neuron``: one row per
            neuron; ``mean``: no node of its own, see :attr:`TableRow.rest`.
        shape: The tensor's shape.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=512)
    rows: Rows
    shape: tuple[int, ...] = Field(min_length=1, max_length=4)


class Site(BaseModel):
    """The mask nodes before one output projection.

    Attributes:
        output: Module path of the output projection.
        kind: ``attention`` or ``ffn``.
        heads: H, attention only.
        kv_heads: K, attention only; each is shared by H / K query heads, consecutive ones.
        neurons: D, FFN only.
        inputs: Module paths of the projections that feed the site, in the table's order.
        tensors: The governed tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field(min_length=1, max_length=512)
    kind: Kind
    heads: int = Field(default=0, ge=0)
    kv_heads: int = Field(default=0, ge=0)
    neurons: int = Field(default=0, ge=0)
    inputs: tuple[str, ...]
    tensors: tuple[GovernedTensor, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Site":
        ffn = self.kind == "ffn"
        if (self.neurons > 0) != ffn or (self.heads > 0) == ffn or (self.kv_heads > 0) == ffn:
            raise ValueError("an FFN site has neurons only, an attention site heads and kv_heads only")
        if not ffn and self.heads % self.kv_heads:
            raise ValueError("kv_heads must divide heads")
        if any((tensor.rows == "neuron") != ffn for tensor in self.tensors if tensor.rows != "mean"):
            raise ValueError("rows that do not fit the kind of site")
        return self

    def nodes(self) -> dict[Node, int]:
        """The kinds of Fisher vector this site has, and their lengths."""
        if self.kind == "ffn":
            return {"neuron_fisher": self.neurons}
        return {"head_fisher": self.heads, "kv_head_fisher": self.kv_heads}


def find_sites(shapes: Mapping[str, tuple[int, ...]], heads: int) -> tuple[Site, ...]:
    """Find every site of a checkpoint.

    Args:
        shapes: Tensor names and shapes.
        heads: H, the number of query heads. The number of key-value heads follows from the shapes.

    Returns:
        The sites, layer by layer, attention before FFN.

    Raises:
        ValueError: If a projection's rows cannot be divided among the heads (names the tensor).
    """
    sites = []
    for row in TABLE:
        suffix = f"{row.out}.weight"
        for name in shapes:
            prefix = name.removesuffix(suffix)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            if all(f"{prefix}{path}.weight" in shapes for path in row.inputs):
                sites.append(_site(row, prefix, shapes, heads))
    return tuple(sorted(sites, key=_reading_order))


def _site(row: TableRow, prefix: str, shapes: Mapping[str, tuple[int, ...]], heads: int) -> Site:
    inputs = tuple(prefix + path for path in row.inputs)
    rows: tuple[Rows, ...] = ("query", "key")
    if row.kind == "ffn":
        rows = tuple("neuron" for _ in inputs)
    governed = dict(zip(inputs, rows, strict=True))
    governed |= {_resolve(path, prefix): "mean" for path in row.rest}
    tensors = tuple(
        GovernedTensor(name=name, rows=kind, shape=tuple(shapes[name]))
        for module, kind in governed.items()
        for name in (f"{module}.weight", f"{module}.bias")
        if name in shapes
    )
    first_rows = shapes[f"{inputs[0]}.weight"][0]
    if row.kind == "ffn":
        return Site(output=prefix + row.out, kind="ffn", neurons=first_rows, inputs=inputs, tensors=tensors)
    key_rows = shapes[f"{inputs[1]}.weight"][0]
    # A head's width is that of its output; a query projection may hold more rows per head (a gate).
    width = shapes[f"{prefix}{row.out}.weight"][-1]
    head_dim = width // heads if heads > 0 else 0
    kv_heads = key_rows // head_dim if head_dim else 0
    if not kv_heads or width % heads or first_rows % width or key_rows % head_dim or heads % kv_heads:
        raise ValueError(
            f"{inputs[0]}.weight has {first_rows} rows and {inputs[1]}.weight {key_rows}: "
            f"they do not divide among {heads} heads"
        )
    return Site(
        output=prefix + row.out,
        kind="attention",
        heads=heads,
        kv_heads=kv_heads,
        inputs=inputs,
        tensors=tensors,
    )


def _resolve(path: str, prefix: str) -> str:
    """A path of the table as a module path; ``/x`` stands beside the prefix's last numbered part."""
    if not path.startswith("/"):
        return prefix + path
    parts = prefix.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join([*parts[: last + 1], path[1:]])


def _reading_order(site: Site) -> tuple[str, list[int], str, str]:
    """Stack by stack, layer by layer, attention before FFN."""
    parts = site.output.split(".")
    stack = next((".".join(parts[:index]) for index, part in enumerate(parts) if part.isdigit()), "")
    return stack, [int(part) for part in parts if part.isdigit()], site.kind, site.output


def name_template(name: str) -> str:
    """A tensor's name with its layer numbers left out: what tensors of different layers have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def row_fisher(rows: Rows, fisher: Mapping[Node, Tensor], count: int) -> Tensor:
    """Fisher information of each row of a governed tensor.

    Args:
        rows: What the tensor's rows are governed by, not ``mean``.
        fisher: The site's Fisher vectors, ``head_fisher [H]`` and ``kv_head_fisher [K]``, or
            ``neuron_fisher [D]``.
        count: The tensor's number of rows, a multiple of the vector's length.

    Returns:
        A vector ``[count]``: row r of a query matrix gets the Fisher of head r // (count / H), and so on.
    """
    vector = fisher[_NODE_OF[rows]]
    return vector.repeat_interleave(count // len(vector))


def sum_over_groups(head_gradients: Tensor, kv_heads: int) -> Tensor:
    """Per-sample gradient of the mask that a key-value head's query heads share, ``[B, H] -> [B, K]``.

    It is the sum of the heads' gradients; its square is not the sum of their squares.
    """
    return head_gradients.unflatten(-1, (kv_heads, -1)).sum(-1)


_NODE_OF: dict[Rows, Node] = {
    "query": "head_fisher",
    "key": "kv_head_fisher",
    "neuron": "neuron_fisher",
}
