"""A picture of sidecars: where the Fisher information of a checkpoint's mask nodes is."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fisher_mask_mergekit.errors import FisherMaskError
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import Kind, Node, layer_of

_NO_COLOUR = "lightgrey"  # Zero has no place on a logarithmic scale.


def head_fisher_map(sidecars: Mapping[str, Sidecar], path: Path) -> None:
    r"""Draw the Fisher information of several checkpoints' mask nodes, one column per checkpoint.

    Above, :math:`I_{ii}` of each head mask, layers by heads, in nats squared, on one logarithmic colour scale
    for all; grey is exactly 0, or no such head. Below, the distribution of the neuron masks'
    per layer: quartiles, and whiskers from the 5th to the 95th percentile, zeros left out.

    Args:
        sidecars: Title to sidecar, from left to right.
        path: Where to write a PNG; written under a temporary name, then renamed.

    Raises:
        FisherMaskError: If there is no sidecar, or the file cannot be written.
    """
    if not sidecars:
        raise FisherMaskError("there is no sidecar to draw")
    heads = {title: _layers(sidecar, "attention", "head_fisher") for title, sidecar in sidecars.items()}
    neurons = {title: _layers(sidecar, "ffn", "neuron_fisher") for title, sidecar in sidecars.items()}
    most_heads = max((len(v) for layers in heads.values() for v in layers.values()), default=1)
    most_layers = max(len(layers) for layers in heads.values())
    width = min(max(3.6, 0.35 * most_heads, 0.2 * most_layers), 8)
    figure = Figure(
        figsize=(width * len(sidecars) + 1.2, min(1.6 + 0.4 * most_layers, 9) + 3), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2,
        len(sidecars),
        squeeze=False,
        height_ratios=[min(1.6 + 0.4 * most_layers, 9), 3],
    )
    scale = _scale([vector for layers in heads.values() for vector in layers.values()])
    for column, (title, sidecar) in enumerate(sidecars.items()):
        upper, lower = axes[:, column]
        upper.set_title(f"{title} ({sidecar.metadata.samples} samples)")
        image = _draw_heads(upper, heads[title], scale)
        if column:
            lower.sharey(axes[1, 0])
            lower.tick_params(labelleft=False)
        _draw_neurons(lower, neurons[title])
    figure.colorbar(image, ax=list(axes[0]), label="Fisher information\nof the head mask (nats²)")
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("Fisher information\nof neuron masks (nats²)")
    figure.supxlabel(
        "grey heads: exactly 0, or no such head; boxes: median and quartiles, whiskers from 5 % to 95 %",
        fontsize="small",
        color="0.3",
    )
    _write(figure, path)


def _layers(sidecar: Sidecar, kind: Kind, node: Node) -> dict[str, numpy.ndarray]:
    """Layer name to Fisher vector, in the checkpoint's order."""
    outputs = [site.output for site in sidecar.metadata.sites if site.kind == kind]
    vectors = [sidecar.fisher[output][node].double().flatten().numpy() for output in outputs]
    return dict(zip(_layer_names(outputs), vectors, strict=True))


def _layer_names(outputs: Sequence[str]) -> list[str]:
    """Layer numbers; where two sites would share one, as in an encoder with a decoder, the full names."""
    numbers = [layer_of(name) or name for name in outputs]
    return numbers if len(set(numbers)) == len(numbers) else list(outputs)


def _scale(vectors: Sequence[numpy.ndarray]) -> LogNorm:
    """A logarithmic scale over all positive values, of at least a factor of 2 either side."""
    positive = numpy.concatenate([*vectors, numpy.zeros(0)])
    positive = positive[positive > 0]
    if len(positive) == 0:
        return LogNorm(0.5, 2)
    low, high = positive.min(), positive.max()
    return LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)


def _draw_heads(axis: Any, layers: Mapping[str, numpy.ndarray], scale: LogNorm) -> Any:
    """Layers by heads, the first layer at the top."""
    count = max((len(vector) for vector in layers.values()), default=1)
    matrix = numpy.full((max(len(layers), 1), count), numpy.nan)
    for row, vector in zip(matrix, layers.values(), strict=False):
        row[: len(vector)] = vector
    image = axis.imshow(
        numpy.ma.masked_where(~(matrix > 0), matrix),
        cmap=colormaps["viridis"].with_extremes(bad=_NO_COLOUR),
        norm=scale,
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_xlabel("head")
    axis.set_xticks(_ticks(count))
    rows = _ticks(len(layers))
    axis.set_yticks(rows, [list(layers)[row] for row in rows])
    return image


def _draw_neurons(axis: Any, layers: Mapping[str, numpy.ndarray]) -> None:
    """One box per layer."""
    axis.boxplot(
        [vector[vector > 0] for vector in layers.values()],
        positions=range(len(layers)),
        widths=0.6,
        whis=(5, 95),
        showfliers=False,
        medianprops={"color": "black"},
        patch_artist=True,
        boxprops={"facecolor": "lightsteelblue"},
    )
    axis.set_yscale("log")
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.set_xlabel("layer")
    columns = _ticks(len(layers))
    axis.set_xticks(columns, [list(layers)[column] for column in columns])
    zeros = sum(int((vector == 0).sum()) for vector in layers.values())
    if zeros:
        total = sum(len(vector) for vector in layers.values())
        axis.set_title(f"{zeros} of {total} neurons have exactly 0", fontsize="small")


def _ticks(count: int) -> list[int]:
    """At most a dozen evenly spaced positions, the first included."""
    return list(range(0, count, max(1, -(-count // 12))))


def _write(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        temporary.replace(path)
    except OSError as error:
        raise FisherMaskError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
