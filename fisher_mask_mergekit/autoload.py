"""Makes mergekit know the merge methods without being asked: a post-import hook, standard library only.

mergekit 0.1.5 has no plug-in discovery. torch (>= 2.5) calls every entry point of the group
``torch.backends`` at the end of ``import torch``, and mergekit imports torch before its own registry;
so :func:`install`, called there, only has to wait for the registry. Whatever goes wrong is logged and
never raised: torch refuses to import if an entry point raises.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_REGISTRY = "mergekit.merge_methods.registry"
METHODS = {
    "fisher_mask": "fisher_mask_mergekit.method",
    "fisher_diagonal": "fisher_mask_mergekit.diagonal_method",
}
"""The merge methods, and the modules that have them under the same name."""


def install() -> None:
    """Register the methods with mergekit now if it is loaded, else right after it loads its registry.

    Safe to call any number of times; never raises.
    """
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "register"):
        _register(registry)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder:
    """Finds mergekit's registry as the other finders do, and has it call :func:`_register` once executed.

    A finder by its method alone: ``importlib.abc``, which has the base class, takes 20 ms to import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> "ModuleSpec | None":
        if fullname != _REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(registry: ModuleType) -> None:
    for name, path in METHODS.items():
        try:
            module = importlib.import_module(path)
            if not hasattr(module, name):
                continue  # It is being imported this very moment, and calls install() at its end.
            method = getattr(module, name)
            if method not in registry.registered_methods():
                registry.register(method)
        except Exception as error:
            import logging

            logging.getLogger(__name__).warning(
                "mergekit will not know the merge method '%s': %s: %s", name, type(error).__name__, error
            )
