"""Per-sample gradients of one module's parameters, from what went into it and the gradient of what came out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.nn.functional import layer_norm
from transformers.pytorch_utils import Conv1D

from fisher_mask_mergekit.activations import Remake, remake_of

Kind = Literal["linear", "transposed", "embedding", "scale", "other"]
"""How a module's parameters enter its output, see :func:`kind_of`."""


@dataclass(frozen=True, eq=False)
class Call:
    """A module's run in a forward pass.

    Attributes:
        module: Any module whose output, and whose tensor arguments, hold the samples one after the other.
        kind: Its kind.
        samples: How many samples.
        args: What it was given.
        kwargs: Likewise.
        remake: If not None, makes its only argument again, which is then not kept.
        source: The operation that gave its only argument, and which of its results that is, if it is a linear module's:
            where calls have the same, they were given the same.
        versions: Of its tensor arguments: how often each had been changed in place.
    """

    module: nn.Module
    kind: Kind
    samples: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    remake: Remake | None = None
    source: tuple[Node, int] | None = None
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", tuple(tensor._version for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Its tensor arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def given(self, rows: slice = slice(None)) -> Tensor:
        """Some rows (along the first axis) of its first argument."""
        first: Tensor = self.args[0][rows] if self.remake is None else self.remake(rows)
        return first

    def lean(self, given: Any) -> "Call":
        """The same with its source, and without its input where that can be made again as long as its graph is there.

        Args:
            given: The input, as part of the graph.
        """
        # What was changed in place, no operation's own result is.
        if self.kind not in ("linear", "transposed") or given._version or given.grad_fn is None:
            return self
        known = replace(self, source=(given.grad_fn, given.output_nr))
        remake = remake_of(given)
        return known if remake is None else replace(known, args=(), kwargs={}, remake=remake)

    def kept(self) -> "Call":
        """The same for when the graph is gone."""
        known = replace(self, source=None)
        return known if self.remake is None else replace(known, args=(self.given(),), remake=None)

    def is_intact(self) -> bool:
        """Whether its tensor arguments are still what they were."""
        return self.versions == tuple(tensor._version for tensor in self.tensors())


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own floating parameters, by their names in it."""
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    return {name: parameter for name, parameter in own if parameter.is_floating_point()}


@torch.no_grad()
def kind_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Kind:
    """How a module's parameters enter its output, told by one run.

    ``linear``: :math:`y = x W^T + b`; ``transposed``: :math:`y = x W + b`; ``embedding``: rows of W;
    ``scale``, a norm for one: an output that is affine in every single element of a weight and a bias over
    its last axes; ``other``: anything else.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward and output.ndim > 1:  # Else no axis is of samples or tokens.
        return "linear"
    if forward is Conv1D.forward:
        return "transposed"
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not kwargs
        return "embedding" if plain else "other"
    own = own_parameters(module)
    if "weight" not in own or own.keys() - {"weight", "bias"} or not args:
        return "other"
    if _is_layer_norm(module):
        return "scale"
    shape = own["weight"].shape
    fits = output.shape[output.ndim - len(shape) :] == shape and output.ndim > len(shape)
    if not fits or any(value.shape != shape for value in own.values()):
        return "other"
    at = [_with(module, args, kwargs, 0.0), _with(module, args, kwargs, 1.0)]
    probe = torch.linspace(-1.7, 1.9, shape.numel(), dtype=own["weight"].dtype).reshape(shape)
    probe = probe.to(output.device)
    wanted = at[0] + probe * (at[1] - at[0]) + (0 if "bias" not in own else probe)
    got = _with(module, args, kwargs, probe, probe)
    near = torch.finfo(output.dtype).eps ** 0.5 * max(1.0, float(wanted.abs().max()))
    return "scale" if float((got - wanted).abs().max()) <= near else "other"


def _with(
    module: nn.Module, args: Any, kwargs: Any, weight: float | Tensor, bias: float | Tensor = 0.0
) -> Tensor:
    """What a module would give with another weight and bias."""
    values = {
        name: torch.zeros_like(value) + (weight if name == "weight" else bias)
        for name, value in own_parameters(module).items()
    }
    return functional_call(module, values, args, kwargs)


def per_sample(call: Call, name: str, gradient: Tensor) -> Iterable[Tensor]:
    r"""Every sample's gradient of one of a module's parameters.

    With :math:`x_{n,t}` and :math:`g_{n,t} = \partial \ell_n / \partial y_{n,t}` at the sample's tokens t: of a
    matrix, :math:`\sum_t g_{n,t} x_{n,t}^T`; of a bias, :math:`\sum_t g_{n,t}`; of an embedding's row, the sum over the
    tokens that are it; of a scale s, :math:`\sum_t g_{n,t} \, \partial y_{n,t} / \partial s`. Of anything else, by
    autograd of the module alone.

    Args:
        call: The module's run.
        name: The parameter's name in it.
        gradient: That of the samples' summed losses by the module's output.

    Returns:
        One after the other, so that there is one at a time; as one tensor ``[B, ...]`` where that is small.
        In float32 or wider.
    """
    shape = own_parameters(call.module)[name].shape
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if call.kind == "scale" or (name == "bias" and call.kind in ("linear", "transposed")):
        product = gradient.to(wide)
        if name == "weight":
            product = _scaled(call, wide).mul_(product)
        return product.reshape(call.samples, -1, *shape).sum(1)
    if call.kind in ("linear", "transposed"):
        return matrices(call, gradient)
    if call.kind == "embedding":
        return _dense(call, gradient, shape)
    return _by_autograd(call, name, gradient, wide)


def _scaled(call: Call, wide: torch.dtype) -> Tensor:
    """What every element of a module's weight, of kind ``scale``, is multiplied by; new."""
    module = call.module
    with torch.no_grad():
        if _is_layer_norm(module):
            return layer_norm(call.args[0].to(wide), module.normalized_shape, eps=module.eps)
        return (_with(module, call.args, call.kwargs, 1.0) - _with(module, call.args, call.kwargs, 0.0)).to(
            wide
        )


def _is_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether it is one, and gives nothing else: by a method of its own, or by a hook beside the one that measures."""
    plain = type(module).forward is nn.LayerNorm.forward and "forward" not in vars(module)
    return plain and len(module._forward_hooks) <= 1


@dataclass(frozen=True, eq=False)
class Product:
    """What gives every sample's gradient of the matrix of a linear module.

    Attributes:
        name: The parameter's name in the model.
        call: The module's run.
        gradient: That of the samples' summed losses by the module's output.
    """

    name: str
    call: Call
    gradient: Tensor


def matrices(call: Call, gradient: Tensor, given: Tensor | None = None) -> Iterator[Tensor]:
    """Every sample's gradient of the matrix of a linear module, one after the other; its input is made, if it is not given."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    given = call.given() if given is None else given
    for one, backward in zip(given.chunk(call.samples), gradient.chunk(call.samples), strict=True):
        x, g = one.flatten(0, -2).to(wide), backward.flatten(0, -2).to(wide)
        yield x.T @ g if call.kind == "transposed" else g.T @ x


def embedding_rows(call: Call, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all rows of an embedding that samples read: the sample ``[U]``, the row ``[U]``, its gradient ``[U, D]``."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    count = len(own_parameters(call.module)["weight"])
    ids = call.args[0].reshape(call.samples, -1).long()
    first = count * torch.arange(call.samples, device=ids.device)[:, None]
    read, position = (ids + first).flatten().unique(return_inverse=True)
    found = gradient.new_zeros(len(read), gradient.shape[-1], dtype=wide)
    found.index_add_(0, position, gradient.flatten(0, -2).to(wide))
    rows = read % count
    if call.module.padding_idx is not None:
        found[rows == call.module.padding_idx] = 0
    return read // count, rows, found


def _dense(call: Call, gradient: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    samples, rows, found = embedding_rows(call, gradient)
    for sample in range(call.samples):
        own = samples == sample
        yield found.new_zeros(shape).index_copy_(0, rows[own], found[own])


def _by_autograd(call: Call, name: str, gradient: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    own = {key: value.detach() for key, value in own_parameters(call.module).items()}
    for position, backward in enumerate(gradient.chunk(call.samples)):

        def of_sample(value: Any, position: int = position) -> Any:
            return value.chunk(call.samples)[position].detach() if isinstance(value, Tensor) else value

        args = tuple(of_sample(value) for value in call.args)
        kwargs = {key: of_sample(value) for key, value in call.kwargs.items()}
        with torch.enable_grad():
            parameter = own[name].clone().requires_grad_()
            output = functional_call(call.module, own | {name: parameter}, args, kwargs)
            (found,) = torch.autograd.grad(output, parameter, backward, allow_unused=True)
        yield torch.zeros_like(parameter, dtype=wide) if found is None else found.to(wide)
