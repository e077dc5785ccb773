"""Which of a checkpoint's tensors a tensor is, told by sixteen of its values."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import SidecarMismatchError
from fisher_mask_mergekit.sites import name_template

VALUES_PER_TENSOR = 16
"""How many values of a tensor are kept to recognise it by."""

_STRIDE = 2654435761  # A prime larger than any row, so that the values are spread over rows and columns.


def probe(tensor: Tensor) -> Tensor:
    """The values a tensor is recognised by, ``[min(16, numel)]``, in its own dtype, on the CPU.

    Value k is at ``(k * 2654435761) mod numel`` in row-major order.
    """
    positions = torch.tensor(probed_positions(tensor.numel()), device=tensor.device, dtype=torch.long)
    return tensor.detach().reshape(-1)[positions].cpu()


def probed_positions(count: int) -> list[int]:
    """Where in row-major order :func:`probe` takes its values of a tensor of ``count`` elements."""
    return [value * _STRIDE % count for value in range(min(VALUES_PER_TENSOR, count))]


class Recognition:
    """The shapes of a checkpoint's tensors and the values that :func:`probe` took of them.

    Args:
        known: By name, of the same tensor in all layers in order; the values as wide as they were stored, and perhaps
            more than the tensor has.
        about: Whose tensors they are, for messages.
    """

    def __init__(self, known: Mapping[str, tuple[tuple[int, ...], Tensor]], about: str) -> None:
        self._known = known
        self._about = about
        self._families: dict[str, list[str]] = {}
        for name in known:
            self._families.setdefault(name_template(name), []).append(name)
        self._fitting: dict[tuple[str, torch.dtype], dict[tuple[object, ...], list[str]]] = {}

    def which(self, name: str, tensor: Tensor) -> str | None:
        """Which of the tensors this is: the one of that name if its values fit, else the only one that fits.

        Args:
            name: The name it goes by; where a merge moves layers, another layer's.
            tensor: The tensor, in any floating-point dtype and on any device.

        Returns:
            Its name; None if no tensor of such a name is known in any layer.

        Raises:
            SidecarMismatchError: If none fits, or several.
        """
        template = name_template(name)
        if template not in self._families:
            return None
        got = probe(tensor)
        key = tuple(tensor.shape), *got.tolist()
        if name in self._known and self._key(name, got.dtype) == key:
            return name
        found = self._by_key(template, got.dtype).get(key, [])
        if len(found) == 1:
            return found[0]
        what = f"fits several layers ({', '.join(found[:3])})" if found else "has other values"
        raise SidecarMismatchError(f"{self._about}: tensor '{name}' {what}")

    def _key(self, name: str, dtype: torch.dtype) -> tuple[object, ...]:
        """A tensor's shape and values after the cast; 0 and -0 are equal, and what is not a number equals nothing."""
        shape, values = self._known[name]
        return shape, *values[: torch.Size(shape).numel()].to(dtype).tolist()

    def _by_key(self, template: str, dtype: torch.dtype) -> dict[tuple[object, ...], list[str]]:
        """The names of the same tensor in all layers, by shape and values; made when first asked for."""
        if (template, dtype) not in self._fitting:
            names: dict[tuple[object, ...], list[str]] = {}
            for name in self._families[template]:
                names.setdefault(self._key(name, dtype), []).append(name)
            self._fitting[template, dtype] = names
        return self._fitting[template, dtype]
