"""Tensors of a checkpoint that a merge would silently leave out of its output."""

from collections.abc import Callable, Iterable
from typing import Any

from fisher_mask_mergekit.preview.plan import Output
from fisher_mask_mergekit.sites import name_template
from fisher_mask_mergekit.skeleton import Shapes, renaming


def lost_tensors(outputs: Iterable[Output], stored: Shapes, model: Any, moved: bool = False) -> list[str]:
    """Find the tensors that no output holds.

    A tensor of the files is in the merge under its own name, under the name that it has in the loaded model,
    or under another that is loaded as the same; and so is one that is tied to such a tensor. What
    transformers does not load, buffers that old checkpoints hold for example, is no loss.

    Args:
        outputs: mergekit's plan.
        stored: Names and shapes of the tensors in a checkpoint's files.
        model: Its model on the meta device.
        moved: Whether the recipe picks layers: then a tensor counts as merged if it is in any layer.

    Returns:
        Names as the loaded model has them.
    """
    model.tie_weights()
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rename = renaming(model, state)
    tied = _tied(model)
    key: Callable[[str], str] = name_template if moved else str
    files = {key(name) for name in stored}
    written = {key(output.name) for output in outputs if output.there}
    # What is written under a name of the files is that tensor; it is not another one besides.
    loaded = written | {key(rename(output.name)) for output in outputs if key(output.name) in written - files}
    loaded |= {key(twin) for name in state if key(name) in loaded for twin in tied.get(name, ())}

    def is_lost(name: str) -> bool:
        inside = rename(name)
        return inside in state and key(name) not in written and key(inside) not in loaded

    return list(dict.fromkeys(rename(name) for name in stored if is_lost(name)))


def _tied(model: Any) -> dict[str, list[str]]:
    """Every tied parameter's name, to the names of all that share its values."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}
