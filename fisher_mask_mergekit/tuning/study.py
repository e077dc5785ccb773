"""A tuning run's trials: on disk whole after every one, and what to try next, told by them alone."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
from pydantic import BaseModel, ConfigDict, ValidationError

from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.store import write_whole
from fisher_mask_mergekit.tuning.coefficients import OCTAVES, Coefficients, starts

_WEIGHT, _NORMALIZE, _PRIOR = "weight of ", "normalize", "prior"
"""What the sampler calls what it chooses."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Trial(_Record):
    """One merge and its scores.

    Attributes:
        number: From 0, the recipe as it is.
        weights: Every model's lambda.
        normalize: The method's ``normalize``; None if it has none.
        prior: The method's ``prior``; None if it is not searched.
        scores: By task, the merge's score by the task's first metric; None where it is not defined.
        value: Mean over tasks of the normalised scores; None if one is not defined.
    """

    number: int
    weights: dict[str, float]
    normalize: str | None
    prior: float | None = None
    scores: dict[str, float | None]
    value: float | None

    @property
    def coefficients(self) -> Coefficients:
        """What was merged with."""
        return Coefficients(self.weights, self.normalize, self.prior)


class Study(_Record):
    """All that a tuning run knows.

    Attributes:
        format_version: Of this file.
        key: Of all that trials depend on, by what it is.
        own: By task, the fine-tuned model's score; empty before it is run.
        trials: In order.
        written: SHA-256 of every recipe that the run has written.
    """

    format_version: Literal[1] = 1
    key: dict[str, str]
    own: dict[str, float] = {}
    trials: tuple[Trial, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def best(self) -> Trial:
        """The trial with the highest value, the earliest of several."""
        return max(self.trials, key=lambda one: -float("inf") if one.value is None else one.value)

    def but(self, **changes: Any) -> "Study":
        """A copy with some fields replaced."""
        return self.model_copy(update=changes)


def read_study(path: Path, key: Mapping[str, str]) -> Study:
    """The study at ``path``, or a new one.

    Args:
        path: Its file.
        key: Of all that its trials must depend on.

    Raises:
        RecipeError: If it is no whole study, or another run's.
    """
    remedy = "remove it to begin anew, or choose another OUT"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Study(key=dict(key))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        study = Study.model_validate_json(content)
        if [one.number for one in study.trials] != list(range(len(study.trials))):
            raise ValueError
    except (ValidationError, ValueError) as error:
        raise RecipeError(f"{path} is torn, or not a study of mergekit-fisher tune; {remedy}") from error
    differing = [name for name in {**study.key, **key} if study.key.get(name) != key.get(name)]
    if differing:
        listed = "; ".join(_difference(name, study.key.get(name), key.get(name)) for name in differing)
        raise RecipeError(f"{path} is the study of another run; what differs: {listed}; {remedy}")
    return study


def _difference(name: str, then: str | None, now: str | None) -> str:
    if any(value is None or len(value) == 64 for value in (then, now)):  # A digest tells nothing.
        return name
    return f"{name}: {then} then, {now} now"


def save_study(study: Study, path: Path) -> None:
    """Write it, whole or not at all.

    Raises:
        RecipeError: If it cannot be written.
    """
    try:
        write_whole(path, f"{json.dumps(study.model_dump(), indent=1)}\n".encode())
    except OSError as error:
        raise RecipeError(f"cannot write {path}: {error.strerror or error}") from error


def suggest(own: Coefficients, choices: Sequence[str], trials: Sequence[Trial], seed: int) -> Coefficients:
    """What to try next.

    The sampler is made anew from ``seed`` and the trials' number, so that a run that was interrupted goes on as if it
    had not been. No two pairs of these share their numbers.

    Args:
        own: The recipe's coefficients.
        choices: What ``normalize`` can be.
        trials: All so far.
        seed: Of the run.

    Reference: the tree-structured Parzen estimator of Bergstra et al. 2011, as Optuna has it.
    """
    first = starts(own, choices)
    if len(trials) < len(first):
        return first[len(trials)]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        f"{_WEIGHT}{name}": optuna.distributions.FloatDistribution(
            min(-OCTAVES, octave), max(OCTAVES, octave)
        )
        for name, octave in own.octaves.items()
    }
    if own.prior is not None:
        distributions[_PRIOR] = optuna.distributions.FloatDistribution(-OCTAVES, OCTAVES)
    if choices:
        distributions[_NORMALIZE] = optuna.distributions.CategoricalDistribution(choices)
    own_seed = numpy.random.SeedSequence([seed, len(trials)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=int(own_seed.generate_state(1)[0]), multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        study.add_trial(_frozen(optuna, trial, own, distributions))
    found = study.ask(distributions).params
    octaves = {name: found[f"{_WEIGHT}{name}"] for name in own.octaves}
    return own.at(octaves, found.get(_NORMALIZE), found.get(_PRIOR, 0.0))


def _frozen(optuna: Any, trial: Trial, own: Coefficients, distributions: Mapping[str, Any]) -> Any:
    octaves = {f"{_WEIGHT}{name}": octave for name, octave in trial.coefficients.octaves.items()}
    if own.prior is not None:  # A trial without one is of a version that left it as it is.
        octaves[_PRIOR] = math.log2((trial.prior or own.prior) / own.prior)
    params: dict[str, Any] = {}
    for name, octave in octaves.items():  # What was rounded may be beyond the range.
        params[name] = min(max(octave, distributions[name].low), distributions[name].high)
    if _NORMALIZE in distributions:
        params[_NORMALIZE] = trial.normalize
    states = optuna.trial.TrialState
    state = states.FAIL if trial.value is None else states.COMPLETE
    return optuna.trial.create_trial(
        state=state, value=trial.value, params=params, distributions=dict(distributions)
    )
