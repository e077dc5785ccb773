"""What was summed over samples so far: enough to go on from, to add to another's, and to make means of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from fisher_mask_mergekit.errors import MeasurementError
from fisher_mask_mergekit.shown import one_line

Key = TypeVar("Key")


@dataclass
class Tally(Generic[Key]):
    """Sums over samples, and in what manner the samples run.

    Attributes:
        sums: Of squared gradients, over samples (over batches, for the batch estimator), by what has them: a site's
            node, or a parameter. What no gradient has reached yet is not there.
        samples: N. Batches come in a fixed order, so it is the first N of that order that count.
        loss: Sum over samples of their negative log-likelihood, in nats.
        correct: Sum over samples of the share of their predictions that are right.
        one_by_one: Whether samples run one at a time.
        checked: Samples of the batch that was looked into: whether they lie apart.
        checked_padded: Whether one was padded.
        too_large: The size of the smallest batch that did not fit into memory.
    """

    sums: dict[Key, Tensor] = field(default_factory=dict)
    samples: int = 0
    loss: float = 0.0
    correct: float = 0.0
    one_by_one: bool = False
    checked: int = 0
    checked_padded: bool = False
    too_large: int | None = None

    def check_shapes(self, shapes: Mapping[Key, tuple[int, ...]]) -> None:
        """Refuse sums that are not of what is to be added to.

        Raises:
            MeasurementError: If there is one of something else, or of another shape.
        """
        for key, total in self.sums.items():
            if tuple(total.shape) != shapes.get(key):
                raise MeasurementError(
                    f"the sums to go on from do not fit the model: of {one_line(str(key)):.100} they are {list(total.shape)}, expected "
                    f"{shapes.get(key, 'none')}; begin anew, with --force"
                )


Settle = Callable[[Tally[Key]], Tally[Key]]
"""Given what was summed here once all has run, what the means are made of; of several processes, over all of them."""
