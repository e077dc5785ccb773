"""Which nodes a parameter's rows belong to, found by moving them: a reference for every map from rows to nodes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def changed(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    module: str,
    parameter: str,
    rows: Sequence[int] | Tensor,
    axis: int = 0,
) -> Tensor:
    """Columns of a module's input that change when rows of a parameter do.

    Only the module's first call counts: ALBERT's one layer feeds itself. A key's bias moves all scores
    of a query alike unless positions are rotary, so it changes nothing but the rounding.

    Args:
        model: Is as it was before, afterwards.
        inputs: Arguments of the model's forward pass.
        module: Path of the module whose input is looked at.
        parameter: Name of the parameter that is moved.
        rows: Which of its rows. They are moved at random, each entry differently.
        axis: The parameter's axis that ``rows`` counts on; 1 for a ``Conv1D``.

    Returns:
        Boolean ``[D]``, D the width of the module's input.
    """
    moved = model.get_parameter(parameter)
    index = (slice(None),) * axis + (torch.as_tensor(rows),)
    before = _input_of(model, inputs, module)
    with _replaced(moved, index, moved[index] + _noise(moved[index])):
        after = _input_of(model, inputs, module)
    return (before != after).flatten(0, -2).any(0)


def heard(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    parameter: str,
    index: Any,
    muted: str,
    muted_index: Any,
) -> bool:
    """Whether moving ``parameter[index]`` changes the model's output while ``muted[muted_index]`` is zero.

    For nodes that no module's input shows, as those of experts kept in one tensor: with a node's column
    of the output projection muted, the rows that belong to the node go unheard, and any other is heard.
    """
    with torch.no_grad(), _replaced(model.get_parameter(muted), muted_index, 0.0):
        moved = model.get_parameter(parameter)
        before = model(**inputs)[0]
        with _replaced(moved, index, moved[index] + _noise(moved[index])):
            return bool((model(**inputs)[0] != before).any())


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def _input_of(model: nn.Module, inputs: Mapping[str, Tensor], path: str) -> Tensor:
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].detach().clone())

    handle = model.get_submodule(path).register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _replaced(parameter: Tensor, index: Any, values: Tensor | float) -> Iterator[None]:
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter[index] = values
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(original)
