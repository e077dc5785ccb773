"""A checkpoint's model without its weights: its mask nodes, and what its files call the tensors.

A model in memory may name and lay out its tensors unlike the checkpoint's files do (experts in one tensor
in memory, one by one on disk), and mergekit merges some under the one name and some under the other. Mask
nodes are those of the model in memory; the tensors that they govern are known under both names.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from fisher_mask_mergekit.checkpoint import Checkpoint, read_config, transformers_errors
from fisher_mask_mergekit.sites import GovernedTensor, Shapes, Site
from fisher_mask_mergekit.table import find_sites

_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


def skeleton(model_class: Any, config: Any) -> Any:
    """The model on torch's meta device: modules and shapes, no values."""
    with torch.device("meta"):
        return model_class._from_config(config)


def architecture_of(checkpoint: Checkpoint) -> str:
    """The class that a checkpoint's configuration names."""
    return str((read_config(checkpoint).get("architectures") or ["no class"])[0])


def named_skeleton(checkpoint: Checkpoint) -> Any:
    """The skeleton of the class that a checkpoint's configuration names; None if that is not in transformers.

    Raises:
        CheckpointError: If transformers cannot make it.
    """
    model_class = getattr(transformers, architecture_of(checkpoint), None)
    if model_class is None:  # Its code comes with it.
        return None
    with transformers_errors(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        return skeleton(model_class, config)


def sites_in(model: Any) -> tuple[Site, ...]:
    """Find the mask nodes of a model in memory, and the tensors of it that they govern.

    Args:
        model: The model; its weights do not matter.

    Raises:
        ValueError: If a projection's rows cannot be divided among its heads (names the tensor).
    """
    return find_sites(
        _shapes(model),
        lambda path: heads_of(model, path),
        transposed=_transposed(model),
        model_type=lambda path: model_type_of(model, path),
    )


def sites_of(model: Any, files: Shapes) -> tuple[Site, ...]:
    """Find the mask nodes of a checkpoint, and all names of the tensors that they govern.

    They are those of the model in memory. Of a tensor whose files have it under the same name but laid out
    otherwise, only the files' layout is given: mergekit takes it as it is.

    Args:
        model: The model; its weights do not matter.
        files: Names and shapes of the tensors in the checkpoint's files.

    Raises:
        ValueError: If a projection's rows cannot be divided among its heads, or the files lack a site (names
            the tensor).
    """
    sites = sites_in(model)
    if all(files.get(tensor.name) == tensor.shape for site in sites for tensor in site.tensors):
        return sites
    by_output = {name: site for site in sites for name in (site.output, f"{site.output}.weight")}
    rename = renaming(model, _shapes(model))
    outputs = {name: by_output[loaded] for name in files if (loaded := rename(name)) in by_output}
    missing = [site.output for site in sites if site not in outputs.values()]
    if missing:
        raise ValueError(f"its files have no {missing[0]}")
    tensors = {
        site.output: [t for t in site.tensors if files.get(t.name, t.shape) == t.shape] for site in sites
    }
    for site, tensor in _governed_in_files(model, files, rename, outputs):
        if tensor.name not in {known.name for known in tensors[site.output]}:
            tensors[site.output].append(tensor)
    return tuple(
        Site.model_validate(site.model_dump() | {"tensors": tuple(tensors[site.output])}) for site in sites
    )


def _governed_in_files(
    model: Any, files: Shapes, rename: Callable[[str], str], outputs: Mapping[str, Site]
) -> Iterator[tuple[Site, GovernedTensor]]:
    """What the table finds among the files' names, and the site of the model in memory that each is of."""
    transposed, known = _transposed(model), _shapes(model)

    def heads(path: str) -> int:
        site = outputs.get(f"{path}.weight")
        return site.heads if site else 0

    def kind_of(path: str) -> str:
        site = outputs.get(f"{path}.weight") or outputs.get(path)
        return model_type_of(model, site.output) if site else str(model.config.model_type)

    found = find_sites(
        {name: shape for name, shape in files.items() if rename(name) in known},
        heads,
        transposed={name for name in files if rename(name) in transposed},
        model_type=kind_of,
    )
    for on_disk in found:
        site = outputs.get(f"{on_disk.output}.weight") or outputs.get(on_disk.output)
        if site is not None:
            apart = site.experts > 0 and not on_disk.experts
            for tensor in on_disk.tensors:
                expert = _number(on_disk.output) if apart else None
                yield site, tensor.model_copy(update={"expert": expert})


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _transposed(model: Any) -> set[str]:
    """Weights that are stored ``[in, out]``."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}


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


def model_type_of(model: Any, path: str) -> str:
    """The ``model_type`` of the nearest configuration around a module or parameter: a text model's inside another."""
    while path:
        path = path.rpartition(".")[0]
        found = getattr(getattr(model.get_submodule(path), "config", None), "model_type", None)
        if isinstance(found, str) and found:
            return found
    return ""


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
