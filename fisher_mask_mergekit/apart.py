"""Do a batch's samples lie one after the other in all that is seen of them, and does padding change nothing? Run one by itself, and compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.tasks import Batch, Likelihood, Task

if TYPE_CHECKING:
    from fisher_mask_mergekit.passes import Gradients


@dataclass
class Seen:
    """What went through a model's modules in a forward pass, of a batch's samples that are looked at.

    Attributes:
        samples: B.
        parts: By the place where it was seen: B-ths of a tensor's rows, those of the samples at :attr:`positions`; None if it
            has no B equal parts.
    """

    samples: int
    parts: dict[str, tuple["_Glimpse", ...] | None] = field(default_factory=dict)

    @property
    def positions(self) -> Sequence[int]:
        """Which samples are looked at: the one in the middle, which has others before and behind it; of two, both."""
        return range(self.samples) if self.samples < 3 else (self.samples // 2,)

    def add(self, place: str, tensor: Tensor) -> None:
        """A tensor that went by."""
        self.parts[place] = None
        if tensor.ndim and len(tensor) % self.samples == 0:
            each = len(tensor) // self.samples
            self.parts[place] = tuple(
                _Glimpse.of(tensor[each * position : each * (position + 1)]) for position in self.positions
            )


@dataclass(frozen=True)
class _Glimpse:
    """A tensor's shape and a few thousand of its values, so that the tensor itself may go."""

    shape: torch.Size
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "_Glimpse":
        step = tensor.numel() // 4096 | 1  # Odd, so that not all are of one column.
        return cls(tensor.shape, tensor.detach().reshape(-1)[::step].clone())


def lie_apart(gradients: "Gradients", task: Task, batch: Batch, together: Likelihood, seen: Seen) -> bool:
    """Run a sample of a batch by itself, and both of two: what is beside a sample must not matter.

    Returns:
        Whether all that was seen was the samples', one after the other along the first axis.

    Raises:
        MeasurementError: If a sample gives something else by itself.
    """
    near = _near(gradients)
    apart = True
    for place, position in enumerate(seen.positions):
        single = Seen(1)
        likelihood, fits = gradients.alone(task, batch.single(position), single)
        with torch.no_grad():
            gap, allowed = _gap(likelihood.outputs(0), together.outputs(position), near)
            if gap > allowed:
                raise MeasurementError(
                    f"sample {batch.index[position]} gave log-probabilities up to {gap:.3g} apart in a batch and by "
                    "itself: the model has a random layer that evaluation mode does not switch off, or mixes samples"
                )
            apart &= fits and single.parts.keys() <= seen.parts.keys()
            for where, parts in seen.parts.items():
                own = single.parts.get(where)
                apart &= bool(parts and own and _is_alike(parts[place], own[0], near))
    return apart


@torch.no_grad()
def ignores_padding(gradients: "Gradients", task: Task, batch: Batch, together: Likelihood) -> bool:
    """Run the sample of a batch that is padded most by itself, without its padding: whether it gives the same."""
    position = int(batch.lengths().argmin())
    expected = together.outputs(position)
    try:
        alone = gradients.run(task, batch.single(position).trimmed()).outputs(0)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return True  # It takes texts of certain lengths only: what it gives without padding, nothing can say.
    # Where the tokens are the answers, padding is none, which is 0 in both.
    alone = nn.functional.pad(alone, (0, expected.shape[-1] - alone.shape[-1]))
    gap, allowed = _gap(alone, expected, _near(gradients))
    return gap <= allowed


def _near(gradients: "Gradients") -> float:
    """How far apart, relatively, what is rounded may be; float64 models may compute a part in float32."""
    return max(torch.finfo(next(gradients.model.parameters()).dtype).eps ** 0.5, 1e-6)


def _gap(alone: Tensor, expected: Tensor, near: float) -> tuple[float, float]:
    """The largest difference, and what rounding explains of it."""
    if not expected.numel():
        return 0.0, 0.0
    return float((alone - expected).abs().max()), near * max(1.0, float(expected.abs().max()))


def _is_alike(chunk: _Glimpse, alone: _Glimpse, near: float) -> bool:
    """Whether what was seen of one sample by itself is what was seen of it in the batch."""
    if alone.shape != chunk.shape:
        return False
    gap, allowed = _gap(alone.values, chunk.values, near)
    return gap <= allowed
