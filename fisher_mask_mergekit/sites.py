"""Mask nodes: which there are before an output projection, and which rows or columns of which tensors each governs.

The pre-pass and the merge meet here (and in the sidecar), so they cannot disagree about what a node owns.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fisher_mask_mergekit.untrusted import MOST_COUNT

Kind = Literal["attention", "ffn"]
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor names and shapes."""

Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]
"""Of heads, neurons, elements along an axis: no tensor has more."""

# Not `Count = Field(ge=1)`: pydantic 2.10 takes a field that is written so for one that may be missing.
Positive = Annotated[int, Field(ge=1, le=MOST_COUNT)]
"""Of samples, rows, tokens."""

Name = Annotated[str, Field(min_length=1, max_length=512)]

Node = Literal["head_fisher", "kv_head_fisher", "neuron_fisher"]
NodeKey = tuple[str, Node]
"""A site's output projection and a kind of node."""

Layout = Literal[
    "q", "k", "v", "q k v", "(q k v)", "(k v)", "n", "n n", "(n n)", "columns h", "columns n", "mean"
]  # fmt: skip
"""What the rows of a governed tensor are, in order: of query heads (q), key heads (k), value heads (v),
neurons (n); in parentheses, repeated for every key-value head or every neuron. Of an output projection, what its
columns take: heads' outputs (h), neurons (n). ``mean``: no node of its own."""


class GovernedTensor(BaseModel):
    """A tensor and what its rows, or an output projection's columns, can be weighted by.

    Attributes:
        name: The tensor's name, in the checkpoint's files or in the loaded model.
        layout: What the rows or columns are.
        shape: The tensor's shape.
        axis: Along which the rows lie: 0, but 1 where a weight is stored transposed (Conv1D), and 1 or 2
            in experts' tensors ``[E, ...]``. Along which the columns lie: the other one.
        expert: Which expert's it is, where a site's experts have tensors of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    layout: Layout
    shape: tuple[Count, ...] = Field(min_length=1, max_length=4)
    axis: int = Field(default=0, ge=0, le=2)
    expert: Count | None = None


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

    output: Name
    kind: Kind
    heads: Count = 0
    kv_heads: Count = 0
    head_dim: Count = 0
    neurons: Count = 0
    experts: Count = 0
    inputs: tuple[Name, ...]
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
        if not any(tensor.layout.startswith("columns") for tensor in self.tensors):
            raise ValueError("no tensor has the output projection's columns; measure the checkpoint again")
        return self

    def _governs(self, tensor: GovernedTensor) -> bool:
        if tensor.layout == "mean":
            return True
        if tensor.axis >= len(tensor.shape):
            return False
        if tensor.expert is not None and tensor.expert >= self.experts:
            return False
        rows = tensor.shape[tensor.axis]
        whole = self.experts == 0 or tensor.expert is not None
        if tensor.layout.startswith("columns") and len(tensor.shape) != (2 if whole else 3):
            return False
        if self.kind == "ffn":
            fits = whole or (tensor.axis > 0 and tensor.shape[0] == self.experts)
            per_neuron = {"n": 1, "n n": 2, "(n n)": 2, "columns n": 1}
            return fits and rows == per_neuron.get(tensor.layout, 0) * self.neurons
        if tensor.layout in ("v", "columns h"):
            return rows == (self.kv_heads if tensor.layout == "v" else self.heads) * self.head_dim
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


def stack_of(output: str) -> str:
    """What comes before the first number of a path: ``model.layers``, ``vision_tower.encoder.layers``."""
    parts = output.split(".")
    return next((".".join(parts[:index]) for index, part in enumerate(parts) if part.isdigit()), "")


def layer_of(name: str) -> str:
    """The first number of a path; empty if there is none."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def name_template(name: str) -> str:
    """A tensor's name with its layer numbers left out: what tensors of different layers have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def row_fisher(site: Site, tensor: GovernedTensor, fisher: Mapping[Node, Tensor], values: Tensor) -> Tensor:
    """Fisher information of each row, or an output projection's columns, of a governed tensor.

    Args:
        site: The tensor's site.
        tensor: A governed tensor with a layout other than ``mean``.
        fisher: The site's Fisher vectors, ``head_fisher [H]`` and ``kv_head_fisher [K]``, or
            ``neuron_fisher [D]`` (``[E, D]`` for experts).
        values: Of value rows: ``[1]`` for all of them, or that of their key-value head, ``[K]``.

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
    heads, keys, values = fisher["head_fisher"], fisher["kv_head_fisher"], values.expand(groups)
    if tensor.layout in ("q", "columns h"):
        vector = heads.repeat_interleave(rows // site.heads)
    elif tensor.layout == "k":
        vector = keys.repeat_interleave(rows // groups)
    elif tensor.layout == "v":
        vector = values.repeat_interleave(rows // groups)
    elif tensor.layout == "(k v)":
        key_rows = keys[:, None].expand(-1, rows // groups - site.head_dim)
        vector = torch.cat([key_rows, values[:, None].expand(-1, site.head_dim)], 1).flatten()
    else:
        width = rows // (site.heads + 2 * groups)
        query_rows = heads.reshape(groups, -1).repeat_interleave(width, 1)
        parts = [query_rows, *(vector[:, None].expand(-1, width) for vector in (keys, values))]
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
