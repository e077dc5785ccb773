"""How much a score depends on which rows it was found on: percentile bootstrap over samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy

from fisher_mask_mergekit.evaluation.metrics import Scorer
from fisher_mask_mergekit.evaluation.predictions import Array

RESAMPLES = 1000
_BLOCK = 1 << 22  # Counts at a time.


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; not a number where it is not defined.

    Attributes:
        value: On the samples as they are.
        low: 2.5 % of the resamples are below.
        high: 2.5 % of the resamples are above.
    """

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Of a difference: whether the samples cannot tell it from none."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True, eq=False)
class Resampled:
    """A number on the samples as they are, and on each resample of them.

    Attributes:
        value: As they are.
        draws: ``[R]``, the resamples'.
    """

    value: float
    draws: Array

    @classmethod
    def of(cls, function: Callable[..., Array], *parts: "Resampled") -> "Resampled":
        """A function of others, resample by resample."""
        values = function(*(numpy.array([part.value]) for part in parts))
        return cls(float(values[0]), function(*(part.draws for part in parts)))

    def estimate(self) -> Estimate:
        """With its interval, over the resamples where it is defined."""
        defined = self.draws[numpy.isfinite(self.draws)]
        if not numpy.isfinite(self.value) or len(defined) == 0:
            return Estimate(self.value, numpy.nan, numpy.nan)
        low, high = numpy.percentile(defined, [2.5, 97.5])
        return Estimate(self.value, float(low), float(high))


def resamples(count: int, seed: tuple[int, ...]) -> Iterator[Array]:
    """How often each of N samples is drawn, ``[R, N]`` in blocks of R, :data:`RESAMPLES` in all."""
    generator = numpy.random.default_rng(seed)
    size = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = [numpy.bincount(generator.integers(count, size=count), minlength=count) for _ in range(rows)]
        yield numpy.stack(drawn).astype(float)


def bootstrap(scorers: Mapping[str, Scorer], count: int, seed: tuple[int, ...]) -> dict[str, Resampled]:
    """Several scores on the same N samples and on the same resamples, so that their differences are paired.

    Args:
        scorers: By name.
        count: N.
        seed: Of the resamples.
    """
    with numpy.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = {name: scorer.value() for name, scorer in scorers.items()}
        draws: dict[str, list[Array]] = {name: [] for name in scorers}
        for counts in resamples(count, seed):
            for name, scorer in scorers.items():
                draws[name].append(scorer.resampled(counts))
    return {name: Resampled(values[name], numpy.concatenate(draws[name])) for name in scorers}
