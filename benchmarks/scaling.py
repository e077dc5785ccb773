"""What the pre-pass and the merge of a large model need, on paper.

    python benchmarks/scaling.py [--json FILE]

Counts bytes and FLOPs from a model's shape, and seconds from what a GPU and a disk do per second; measures nothing. The
formulas are those of docs/scaling.md, whose tables are made of the JSON.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from fisher_mask_mergekit.evaluation.table import aligned
from fisher_mask_mergekit.recognition import VALUES_PER_TENSOR

OUT = Path(__file__).parent / "results" / "scaling.json"
WEIGHT, WIDE, SUM = 2, 4, 8
"""Bytes of a bfloat16 weight or activation, of a float32 value, and of a float64 sum."""


@dataclass(frozen=True)
class Shape:
    """What of a Transformer's configuration its cost depends on.

    Attributes:
        name: The model.
        layers: L.
        hidden: d.
        heads: H.
        kv_heads: K.
        head: Width of a head, h.
        dense: D, the intermediate size of layers without experts.
        vocabulary: V, the number of output classes; of a classifier, its labels.
        embedded: Rows of the input embeddings.
        matrices: Of an FFN: 3 with a gate, else 2.
        moe: How many of the layers have experts.
        experts: E of each.
        expert: D of each expert.
        shared: D of the expert that gets every token.
        chosen: How many experts a token gets besides.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    dense: int
    vocabulary: int
    embedded: int
    matrices: int = 3
    moe: int = 0
    experts: int = 0
    expert: int = 0
    shared: int = 0
    chosen: int = 1

    @property
    def width(self) -> int:
        """All heads' outputs, H h."""
        return self.heads * self.head

    @property
    def projected(self) -> int:
        """What the query, key and value projections give, (H + 2 K) h."""
        return (self.heads + 2 * self.kv_heads) * self.head

    def matrix_weights(self, experts: int) -> int:
        """Of all matrices that tokens are multiplied by, so many of every layer's experts among them."""
        attention = self.layers * self.hidden * (self.projected + self.width)
        ffn = (self.layers - self.moe) * self.dense + self.moe * (experts * self.expert + self.shared)
        routers = self.moe * self.hidden * self.experts
        return attention + self.matrices * self.hidden * ffn + routers + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Of a decoder without biases: matrices, embeddings, and the norms' factors."""
        return (
            self.matrix_weights(self.experts)
            + self.hidden * self.embedded
            + (2 * self.layers + 1) * self.hidden
        )

    @property
    def active(self) -> int:
        """Weights that a token is multiplied by."""
        return self.matrix_weights(self.chosen)

    @property
    def nodes(self) -> int:
        """Mask nodes, with one for every key-value head besides."""
        neurons = (self.layers - self.moe) * self.dense
        neurons += self.moe * (self.experts * self.expert + self.shared)
        return self.layers * (self.heads + self.kv_heads) + neurons

    @property
    def governed(self) -> int:
        """Tensors that a merge knows again: attention's four and the FFN's in every layer; experts' in two, gate and up in one."""
        return self.layers * (4 + self.matrices) + 2 * self.moe


def forward_flops(shape: Shape, tokens: int, length: int) -> int:
    """Of samples of so many tokens each: 2 per weight and token, and the two products of attention."""
    return 2 * shape.active * tokens + 4 * length * tokens * shape.width * shape.layers


def backward_flops(shape: Shape, tokens: int, length: int) -> int:
    """Of activations alone, down to the first site: the first layer's attention is left out."""
    first = shape.hidden * shape.projected
    return 2 * (shape.active - first) * tokens + 8 * length * tokens * shape.width * (shape.layers - 1)


def sidecar_bytes(shape: Shape) -> int:
    """Of the tensors in a sidecar, without its header."""
    return WIDE * (shape.nodes + VALUES_PER_TENSOR * shape.governed)


def kept_bytes(shape: Shape, tokens: int, *, recompute: bool = False) -> int:
    """What autograd keeps of a batch of so many tokens until the backward pass, weights in bfloat16.

    Per token: both norms' inputs in float32, q, k, v (but the first layer's), attention's output, the FFN's gate, up and
    activation; and the log-probabilities in float32. With ``recompute``, every layer's input, one layer's whole, and the last
    norm's input.
    """
    inner = (shape.layers - shape.moe) * shape.dense + shape.moe * (
        shape.chosen * shape.expert + shape.shared
    )
    norms, ffn = 2 * WIDE * shape.hidden, shape.matrices * WEIGHT * inner
    whole = shape.layers * (norms + WEIGHT * (shape.projected + shape.width)) + ffn
    if recompute:
        inputs = (shape.layers - 1) * WEIGHT * shape.hidden + WIDE * shape.hidden
        layers = inputs + ceil(whole / shape.layers)
    else:
        layers = whole - WEIGHT * shape.projected
    return tokens * (layers + WIDE * shape.vocabulary)


SHAPES = (
    Shape("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256, 128256),
    Shape(
        "Llama-4-Maverick-17B-128E", 48, 5120, 40, 8, 128, 16384, 202048, 202048,
        moe=24, experts=128, expert=8192, shared=8192,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted, and was not measured.

    Attributes:
        samples: N.
        length: Tokens of each.
        batch: Tokens of a batch on each GPU.
        peak: FLOP/s of an H100 (SXM) in bfloat16, dense.
        share: What part of them is achieved.
        device_bytes: Memory of one.
        link: Bytes per second between a GPU and its host, for weights that do not fit.
        disk: Bytes per second, reading or writing.
        models: In a merge.
    """

    samples: int = 2048
    length: int = 512
    batch: int = 8192
    peak: float = 989e12
    share: float = 0.4
    device_bytes: float = 80e9
    link: float = 50e9
    disk: float = 3e9
    models: int = 2


GPUS = (1, 8, 64)


def seconds(shape: Shape, given: Assumptions, gpus: int) -> tuple[float, str]:
    """How long the pre-pass takes once the weights are loaded, and what it takes to fit: nothing, ``--recompute``, or moving the weights.

    Computing and moving go on at the same time; the longer counts.
    """
    tokens = given.samples * given.length
    forward = forward_flops(shape, tokens, given.length)
    weights, rate = WEIGHT * shape.parameters / gpus, gpus * given.peak * given.share
    computing = (forward + backward_flops(shape, tokens, given.length)) / rate
    if weights + kept_bytes(shape, given.batch) <= given.device_bytes:
        return computing, ""
    computing += forward / rate
    if weights + kept_bytes(shape, given.batch, recompute=True) <= given.device_bytes:
        return computing, " (--recompute)"
    rounds = ceil(tokens / given.batch / gpus)
    return max(computing, rounds * 2 * weights / given.link), " (weights moved)"


def markdown(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables, by title."""
    shapes = [Shape(**values) for values in record["shapes"]]
    given = Assumptions(**record["assumptions"])
    size = [["", "parameters", "a token's", "weights", "sums", "sidecar", "batch kept", "with --recompute"]]
    work = [["", "GFLOP per token", "loading", *(f"{count} x H100" for count in GPUS)]]
    merge = [["", "read", "written", "time", "largest tensor"]]
    for one in shapes:
        kept = [kept_bytes(one, given.batch, recompute=again) for again in (False, True)]
        sizes = [WEIGHT * one.parameters, SUM * one.nodes, sidecar_bytes(one), *kept]
        counts = [f"{count / 1e9:.1f} B" for count in (one.parameters, one.active)]
        size.append([one.name, *counts, *map(_bytes, sizes)])
        sample = forward_flops(one, given.length, given.length) + backward_flops(
            one, given.length, given.length
        )
        timed = [seconds(one, given, count) for count in GPUS]
        loading = WEIGHT * one.parameters / given.disk
        cells = [_time(took) + how for took, how in timed]
        work.append([one.name, f"{sample / given.length / 1e9:,.0f}", _time(loading), *cells])
        read = given.models * WEIGHT * one.parameters
        took = (read + read / given.models) / given.disk
        merge.append(
            [one.name, _bytes(read), _bytes(read / given.models), _time(took), _bytes(WEIGHT * _largest(one))]
        )
    return {
        f"Bytes, a batch of {given.batch:,} tokens": aligned(size),
        f"Time of {given.samples:,} samples of {given.length} tokens": aligned(work),
        f"A merge of {given.models} models": aligned(merge),
    }


def _largest(shape: Shape) -> int:
    """Values of the largest tensor: embeddings, or gate and up of all experts in one."""
    return max(shape.vocabulary, 2 * shape.experts * shape.expert) * shape.hidden


def _bytes(count: float) -> str:
    unit, scale = ("MB", 1e6) if count < 1e9 else ("GB", 1e9)
    return f"{count / scale:,.{1 if count / scale < 100 else 0}f} {unit}"


def _time(took: float) -> str:
    return (
        f"{took:,.0f} s"
        if took < 100
        else f"{took / 60:,.0f} min"
        if took < 6000
        else f"{took / 3600:,.1f} h"
    )


def record() -> dict[str, Any]:
    """Everything that the tables are made of."""
    return {"shapes": [asdict(shape) for shape in SHAPES], "assumptions": asdict(Assumptions())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    options.json.write_text(json.dumps(record(), indent=1) + "\n")
    for title, table in markdown(record()).items():
        print(f"{title}:\n\n{table}\n")


if __name__ == "__main__":
    main()
