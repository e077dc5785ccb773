"""Layers that keep nothing but their input for the backward pass, and run a second time in it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Contexts of one run of a layer: of the forward pass, and of each time that it runs again."""


@dataclass
class LayerRun:
    """A context: a layer's run, the first or the same one again, and which of all watched activations are its own.

    Attributes:
        enter: Told that the run is on, and with None that it is over.
        noted: The activations' places among the watched, in the order that they are run.
        again: Whether it is not the first.
        places: Those that are still to come, if so.
    """

    enter: Callable[["LayerRun | None"], None]
    noted: list[int]
    again: bool
    places: Iterator[int] = field(default_factory=lambda: iter(()))

    def __enter__(self) -> None:
        self.places = iter(self.noted)
        self.enter(self)

    def __exit__(self, *error: object) -> None:
        self.enter(None)


def layer_path(output: str) -> str:
    """The layer that a site's output projection is in: its path up to the first number, and all of it if there is none."""
    parts = output.split(".")
    end = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:end])


@contextmanager
def recomputed(model: nn.Module, layers: Iterable[nn.Module], contexts: Contexts) -> Iterator[None]:
    """Let layers run again in the backward pass, in place of keeping their activations.

    Args:
        model: The layers' model. It fills no caches meanwhile: a second run would add to them.
        layers: Modules of it.
        contexts: Called for every run of a layer.
    """
    with ExitStack() as stack:
        for config in {id(config): config for config in _configs(model)}.values():
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        for layer in layers:
            forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )
            stack.enter_context(replaced(layer, forward))
        yield


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            yield module.config


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass for a module."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
