"""Do a batch's samples lie one after the other in all that is seen of them? Run two by themselves, and compare."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task

if TYPE_CHECKING:
    from fisher_mask_mergekit.passes import Gradients


@dataclass
class Seen:
    """What went through a model's modules in a forward pass, of the batch's first and last sample.

    Attributes:
        samples: B.
        ends: By the place where it was seen: a B-th of a tensor's rows, the first and the last; None if it has no
            B equal parts.
    """

    samples: int
    ends: dict[str, tuple["_Glimpse", "_Glimpse"] | None] = field(default_factory=dict)

    def add(self, place: str, tensor: Tensor) -> None:
        """A tensor that went by."""
        self.ends[place] = None
        if tensor.ndim and len(tensor) % self.samples == 0:
            each = len(tensor) // self.samples
            self.ends[place] = _Glimpse.of(tensor[:each]), _Glimpse.of(tensor[len(tensor) - each :])


@dataclass(frozen=True)
class _Glimpse:
    """A tensor's shape and a few thousand of its values, so that the tensor itself may go."""

    shape: torch.Size
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "_Glimpse":
        step = tensor.numel() // 4096 | 1  # Odd, so that not all are of one column.
        return cls(tensor.shape, tensor.detach().reshape(-1)[::step].clone())


def lie_apart(
    gradients: "Gradients",
    task: Task,
    batch: Batch,
    together: Likelihood,
    seen: Mapping[str, tuple[_Glimpse, _Glimpse] | None],
) -> bool:
    """Run a batch's first and last sample by themselves: what is beside a sample must not matter.

    Returns:
        Whether all that was seen was the samples', one after the other along the first axis.

    Raises:
        MeasurementError: If a sample gives something else by itself.
    """
    eps = torch.finfo(next(gradients.model.parameters()).dtype).eps
    apart = True
    parts = list(batch.split())
    for position in {0, len(parts) - 1}:
        single = Seen(1)
        with torch.no_grad():
            alone = gradients.run(task, parts[position], single).outputs(0)
            expected = together.outputs(position)
            gap = float((alone - expected).abs().max())
            if gap > eps**0.5 * max(1.0, float(expected.abs().max())):
                raise MeasurementError(
                    f"sample {batch.index[position]} gave log-probabilities up to {gap:.3g} apart in a batch and by "
                    "itself: the model has a random layer that evaluation mode does not switch off, or mixes samples"
                )
            apart &= single.ends.keys() <= seen.keys()
            for place, ends in seen.items():
                apart &= _is_alike(ends and ends[position > 0], single.ends.get(place), eps)
    return apart and (gradients.tally.one_by_one or gradients.fits(task, parts[0]))


def _is_alike(chunk: _Glimpse | None, alone: tuple[_Glimpse, _Glimpse] | None, eps: float) -> bool:
    """Whether what was seen of one sample by itself is what was seen of it in the batch."""
    if chunk is None or alone is None or alone[0].shape != chunk.shape:
        return False
    if not chunk.values.numel():
        return True
    gap, largest = (alone[0].values - chunk.values).abs().max(), chunk.values.abs().max()
    return bool((gap <= eps**0.5 * max(1.0, float(largest))).item())
