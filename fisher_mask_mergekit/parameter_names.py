"""What a checkpoint's files call a loaded model's parameters, and where they hold them in other pieces."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fisher_mask_mergekit.skeleton import Shapes, renaming


@dataclass(frozen=True)
class View:
    """A tensor of the files whose elements are some of a parameter's, as :func:`torch.as_strided` takes them.

    Attributes:
        source: The parameter's first name in the loaded model.
        shape: The tensor's.
        offset: Where in the parameter its first element is, in row-major order.
        strides: How far apart in the parameter its neighbours along each axis are.
    """

    source: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def of(self, parameter: Tensor) -> Tensor:
        """The tensor, of a parameter's values or Fisher information."""
        return parameter.contiguous().as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class ParameterNames:
    """What a checkpoint's parameters are called.

    Attributes:
        names: Per parameter, by its first name in the loaded model, all of its names there (of tied ones, several)
            and in the files.
        views: Tensors of the files that are pieces of a parameter, or a parameter transposed.
        others: The files' tensors that are no parameters: buffers, and what the model does not have.
    """

    names: dict[str, tuple[str, ...]]
    views: dict[str, View]
    others: tuple[str, ...]


def parameter_names(model: Any, files: Shapes) -> ParameterNames:
    """Find what a checkpoint's files call the loaded model's parameters.

    Args:
        model: The model; its weights do not matter.
        files: Names and shapes of the tensors in the checkpoint's files.

    Raises:
        ValueError: If the files lay a parameter out in a way that is not known (names it).
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in every.items():
        names[first[id(parameter)]].append(name)
    rename = renaming(model, {name: tuple(parameter.shape) for name, parameter in every.items()})
    others, elsewhere = [], {}
    for name, shape in files.items():
        loaded = rename(name)
        if loaded not in every:
            others.append(name)
        elif tuple(every[loaded].shape) != shape:
            elsewhere[name] = first[id(every[loaded])]
        elif name not in (known := names[first[id(every[loaded])]]):
            known.append(name)
    views: dict[str, View] = {}
    for source in sorted(set(elsewhere.values())):
        views |= _views(model, source, tuple(every[source].shape))
    for name, source in elsewhere.items():
        if name not in views or views[name].shape != files[name]:
            raise ValueError(
                f"its files hold {name} {list(files[name])} for {source} {list(every[source].shape)}"
            )
    return ParameterNames(
        {name: tuple(found) for name, found in names.items()},
        {name: views[name] for name in elsewhere},
        tuple(others),
    )


def _views(model: Any, source: str, shape: tuple[int, ...]) -> dict[str, View]:
    """The pieces in which transformers saves a parameter; empty if it does not say, or they are no views.

    In place of the parameter, its elements' coordinates are saved, one axis at a time.
    """
    coordinates: dict[str, list[Tensor]] = {}
    for axis, size in enumerate(shape):
        along = torch.arange(size, device="cpu").reshape([-1 if k == axis else 1 for k in range(len(shape))])
        try:
            saved: Mapping[str, Tensor] = revert_weight_conversion(model, {source: along.expand(shape)})
        except Exception:  # Whatever the conversion of several parameters into one says of a single one.
            return {}
        for name, piece in saved.items():
            coordinates.setdefault(name, []).append(piece)
    found = {name: _view(source, shape, pieces) for name, pieces in coordinates.items()}
    return {name: view for name, view in found.items() if view is not None}


def _view(source: str, shape: tuple[int, ...], coordinates: list[Tensor]) -> View | None:
    """What takes elements of these coordinates out of a parameter; None if no view does."""
    first = coordinates[0]
    offset, strides = 0, [0] * first.ndim
    for axis, piece in enumerate(coordinates):
        if piece.shape != first.shape or not piece.numel():
            return None
        step = torch.Size(shape[axis + 1 :]).numel()
        start = int(piece[(0,) * piece.ndim])
        wanted = torch.full([1] * piece.ndim, start, device="cpu")
        for k, size in enumerate(piece.shape):
            apart = int(piece[tuple(int(j == k) for j in range(piece.ndim))]) - start if size > 1 else 0
            places = torch.arange(size, device="cpu").reshape(
                [-1 if j == k else 1 for j in range(piece.ndim)]
            )
            wanted = wanted + apart * places
            strides[k] += apart * step
        if not torch.equal(piece, wanted):
            return None
        offset += start * step
    return View(source, tuple(first.shape), offset, tuple(strides))
