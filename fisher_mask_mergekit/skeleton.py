"""A checkpoint's model without its weights: its mask nodes, and what its files call the tensors.

A model in memory may name and lay out its tensors unlike the checkpoint's files do (experts in one tensor
in memory, one by one on disk), and mergekit merges some under the one name and some under the other. Mask
nodes are those of the model in memory; the tensors that they govern are known under both names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from fisher_mask_mergekit.sites import GovernedTensor, Site
from fisher_mask_mergekit.table import find_sites

Shapes = Mapping[str, tuple[int, ...]]

_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


def skeleton(model_class: Any, config: Any) -> Any:
    """The model on torch's meta device: modules and shapes, no values."""
    with torch.device("meta"):
        return model_class._from_config(config)


def sites_of(model: Any, files: Shapes) -> tuple[Site, ...]:
    """Find the mask nodes of a model, and all names of the tensors that they govern.

    Args:
        model: The model; its weights do not matter.
        files: Names and shapes of the tensors in the checkpoint's files.

    Raises:
        ValueError: If a projection's rows cannot be divided among its heads (names the tensor).
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    model_type = model.config.model_type
    sites = find_sites(
        shapes, lambda path: heads_of(model, path), transposed=transposed, model_type=model_type
    )
    if all(tensor.name in files for site in sites for tensor in site.tensors):
        return sites
    rename = renaming(model, shapes)
    loaded = {name: rename(name) for name in files}
    there = set(loaded.values())
    by_output = {name: site for site in sites for name in (site.output, f"{site.output}.weight")}
    missing = [site.output for site in sites if not {site.output, f"{site.output}.weight"} & there]
    if missing:
        raise ValueError(f"its files have no {missing[0]}")

    def heads(path: str) -> int:
        site = by_output.get(loaded.get(f"{path}.weight", ""))
        return site.heads if site else 0

    on_disk = {name for name in files if loaded[name] in transposed}
    extra: dict[str, list[GovernedTensor]] = {}
    known = {path: shape for path, shape in files.items() if loaded[path] in shapes}
    for found in find_sites(known, heads, transposed=on_disk, model_type=model_type):
        weight = f"{found.output}.weight" if f"{found.output}.weight" in files else found.output
        site = by_output.get(loaded[weight])
        if site is None:
            continue
        expert = _number(found.output) if site.experts and not found.experts else None
        known_names = {tensor.name for tensor in site.tensors}
        extra.setdefault(site.output, []).extend(
            tensor.model_copy(update={"expert": expert})
            for tensor in found.tensors
            if tensor.name not in known_names
        )
    return tuple(
        Site.model_validate(site.model_dump() | {"tensors": (*site.tensors, *extra.get(site.output, ()))})
        for site in sites
    )


def renaming(model: Any, shapes: Shapes) -> Callable[[str], str]:
    """What transformers calls a tensor of the checkpoint's files once it has loaded it.

    Args:
        model: The model; its weights do not matter.
        shapes: Names and shapes of its tensors.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = dict(shapes)

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return name if renamed not in shapes and name in shapes else renamed

    return rename


def _number(path: str) -> int:
    """The last number of a path."""
    return [int(part) for part in path.split(".") if part.isdigit()][-1]


def heads_of(model: Any, output: str) -> int:
    """The number of query heads whose outputs enter an attention's output projection.

    The nearest module around it that says so counts, by itself or by its own configuration: so cross
    attention and a vision tower get their own number.

    Raises:
        ValueError: If none does.
    """
    projection = model.get_submodule(output)
    width = projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]
    path = output
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        for holder, names in ((around, _COUNTS), (getattr(around, "config", None), _COUNTS[:1])):
            for name in names:
                heads = getattr(holder, name, None)
                if isinstance(heads, int) and heads > 0 and width % heads == 0:
                    return heads
    raise ValueError(f"no module around {output} says how many heads it has")
