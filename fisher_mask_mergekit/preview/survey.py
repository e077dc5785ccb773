"""Which mask nodes a checkpoint has, told by its configuration and tensor names alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisher_mask_mergekit.checkpoint import modern, read_config
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.preview.peek import Peeked, peek
from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.skeleton import sites_of
from fisher_mask_mergekit.table import find_sites

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True)
class Survey:
    """A checkpoint's mask nodes.

    Attributes:
        checkpoint: As the user named it.
        architecture: Its class.
        sites: Where mask nodes sit, and what they govern.
        averaged: Tensors of its files that no mask node governs in any scheme, and their shapes.
        stored: Names of the tensors in its files.
        is_checked: Whether the model itself was looked at, not only the tensors' names.
    """

    checkpoint: str
    architecture: str
    sites: tuple[Site, ...]
    averaged: Mapping[str, tuple[int, ...]]
    stored: frozenset[str]
    is_checked: bool


def survey(name: str) -> Survey:
    """Find a checkpoint's mask nodes; neither its weights nor code of its own are loaded.

    Raises:
        CheckpointError: If there is no such checkpoint, or its tensors do not fit its configuration.
    """
    peeked = peek(name)
    if peeked.shapes is None:
        raise CheckpointError(
            f"the tensors of {name} cannot be told without a download: it has no safetensors, or the hub cannot be "
            "reached"
        )
    shapes = {modern(tensor): shape for tensor, shape in peeked.shapes.items()}
    model = peeked.model()
    try:
        sites = _by_names(peeked, shapes) if model is None else sites_of(model, shapes)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    governed = {tensor.name for site in sites for tensor in site.tensors if tensor.layout != "mean"}
    averaged = {tensor: shape for tensor, shape in shapes.items() if tensor not in governed}
    return Survey(name, peeked.architecture, sites, averaged, frozenset(shapes), model is not None)


def _by_names(peeked: Peeked, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Site, ...]:
    """For a class that is not in transformers: the table of sites, with the configuration's number of heads."""
    config: dict[str, Any] = read_config(peeked.checkpoint)
    heads = next((config[key] for key in _HEADS if isinstance(config.get(key), int)), None)
    if heads is None:
        raise CheckpointError(
            f"{peeked.checkpoint.name}: transformers has no {peeked.architecture}, and its config.json does not "
            f"say how many heads it has (looked for {', '.join(_HEADS)})"
        )
    return find_sites(shapes, heads, model_type=str(config.get("model_type", "")))
