"""The search: trial after trial until there are as many as asked for, then the best one's recipe."""

import hashlib
import importlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from fisher_mask_mergekit.checkpoint import locate
from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.evaluation.plan import Options, Subject
from fisher_mask_mergekit.evaluation.run import checkpoint_parts
from fisher_mask_mergekit.recipe import Recipe
from fisher_mask_mergekit.store import alone, check_writable, file_digest, write_whole
from fisher_mask_mergekit.tuning.coefficients import LINEAR, Coefficients, normalizations, read_coefficients
from fisher_mask_mergekit.tuning.held_back import held_back, sidecar_path
from fisher_mask_mergekit.tuning.study import Study, read_study, save_study, suggest
from fisher_mask_mergekit.tuning.trials import own_scores, refuse_tokenizer, run_trial
from fisher_mask_mergekit.tuning.written import with_coefficients, written


@dataclass(frozen=True)
class Tuning:
    """A run that was looked into: all that can be wrong before a merge is not.

    Attributes:
        recipe: What is tuned.
        text: As the user wrote it.
        out: Where the best recipe goes.
        own: The recipe's coefficients.
        subjects: Its models, each with its held-back rows.
        options: How to evaluate.
        device: Where.
        study: The trials so far.
        notes: What could not be made sure of.
    """

    recipe: Recipe
    text: str
    out: Path
    own: Coefficients
    subjects: Sequence[Subject]
    options: Options
    device: torch.device
    study: Study
    notes: tuple[str, ...]

    @property
    def rows(self) -> str:
        """What is held back, in words."""
        return ", ".join(
            f"{len(one.samples.labels)} of {one.settings.data} ({one.name})" for one in self.subjects
        )


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other runs from what belongs to ``out`` meanwhile; whoever prepares and runs does it in here.

    Raises:
        RecipeError: If another run has it, or it cannot be written.
    """
    study = study_file(out)
    check_writable(out, study, is_recipe=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(study))
        except BlockingIOError as error:
            raise RecipeError(
                f"another run of mergekit-fisher tune is at {study}; wait until it ends, or choose another OUT"
            ) from error
        except OSError as error:
            raise RecipeError(f"cannot lock {study}: {error.strerror or error}") from error
        yield


def prepare(recipe: Recipe, out: Path, samples: int, options: Options, device: torch.device) -> Tuning:
    """Look for all that can be wrong, and for the trials that were made before.

    Args:
        recipe: What to tune.
        out: Where the best recipe goes; the trials lie beside it.
        samples: How many rows of each model's training data to hold back.
        options: How to evaluate.
        device: Where to run.

    Raises:
        FisherMaskError: On bad input.
    """
    _import_extra()
    study_path = study_file(out)
    check_writable(out, study_path, is_recipe=True)
    if out.resolve() == recipe.path.resolve():
        raise RecipeError(f"{out} is the recipe itself; choose another OUT")
    if out.exists() and not study_path.exists():
        raise RecipeError(f"{out} exists, and no study beside it; remove it, or choose another OUT")
    own = read_coefficients(recipe)
    refuse_tokenizer(recipe)
    text = recipe.path.read_text(encoding="utf-8")
    # That the best can be written is not found out last: all lambdas apart, another normalize, another prior.
    apart = {name: place + 1.0 for place, name in enumerate(own.octaves)}
    another = next((one for one in normalizations(recipe) if one != own.normalize), own.normalize)
    written(recipe, text, own.at(apart, another, 1.0), [])
    held = held_back(recipe, samples, options)
    subjects = held.subjects
    study = read_study(study_path, _key(recipe, subjects, samples, options, device))
    if out.exists() and _digest(out.read_bytes()) not in study.written:
        raise RecipeError(f"{out} exists, and is not what this run wrote; remove it, or choose another OUT")
    save_study(study, study_path)  # That it can be is not found out after the first trial.
    return Tuning(recipe, text, out, own, subjects, options, device, study, held.notes)


def _import_extra() -> None:
    """Find out now whether what only this command needs is there."""
    try:
        for name in ("optuna", "ruamel.yaml"):
            importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            "tune needs Optuna and ruamel.yaml:  pip install 'fisher-mask-mergekit[tune]'"
        ) from error


def run(tuning: Tuning, count: int, on_trial: Callable[[Study], None]) -> Study:
    """Try until there are as many trials as asked for, and write the best one's recipe.

    Args:
        tuning: What was looked into.
        count: How many trials there are to be; those made before count.
        on_trial: Called before the first trial and after every one.

    Returns:
        All trials.

    Raises:
        FisherMaskError: If a merge or a model fails, or a file cannot be written; the trials so far are kept.
    """
    study, recipe = tuning.study, tuning.recipe
    on_trial(study)
    if not study.own:
        study = study.but(own=own_scores(tuning.subjects, tuning.options, tuning.device))
    choices = normalizations(recipe)
    while len(study.trials) < count:
        number = len(study.trials)
        coefficients = suggest(tuning.own, choices, study.trials, tuning.options.seed)
        trial = run_trial(
            recipe, tuning.subjects, number, coefficients, study.own, tuning.options, tuning.device
        )
        study = study.but(trials=(*study.trials, trial))
        save_study(study, study_file(tuning.out))
        on_trial(study)
    return _write_best(tuning, study)


def _write_best(tuning: Tuning, study: Study) -> Study:
    best = study.best
    text = written(
        tuning.recipe, tuning.text, best.coefficients if best.number else None, _notes(tuning, study)
    )
    content = text.encode()
    if tuning.out.exists() and tuning.out.read_bytes() == content:
        return study
    # Known as the run's own before it is there.
    study = study.but(written=(*study.written, _digest(content)))
    save_study(study, study_file(tuning.out))
    try:
        write_whole(tuning.out, content)
    except OSError as error:
        raise RecipeError(f"cannot write {tuning.out}: {error.strerror or error}") from error
    return study


def _notes(tuning: Tuning, study: Study) -> list[str]:
    """What the tuned recipe says on top of itself."""
    best, first = study.best, study.trials[0]
    command = f"mergekit-fisher tune {shlex.quote(str(tuning.recipe.path))}"
    return [
        f"{command}: trial {best.number}, the best of {len(study.trials)}: mean normalised score "
        f"{described(best.value)}; the recipe as it is: {described(first.value)}",
        f"on held-back rows of the training data: {tuning.rows}",
    ]


def described(value: float | None, digits: int = 1) -> str:
    """A score as tables have it."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def study_file(out: Path) -> Path:
    """Where the trials of the recipe that goes to ``out`` are kept."""
    return out.with_suffix(".trials.json")


def _key(
    recipe: Recipe, subjects: Sequence[Subject], samples: int, options: Options, device: torch.device
) -> dict[str, str]:
    """All that trials depend on, by what it is."""
    document = with_coefficients(recipe, None)  # Not so large that it cannot be written out.
    key = {"recipe": _digest(json.dumps(document, sort_keys=True, default=str).encode())}
    for model in recipe.models:
        parts = checkpoint_parts(locate(model.name))
        parts.pop("versions")
        key[f"checkpoint {model.name}"] = _digest(json.dumps(parts, sort_keys=True).encode())
        if recipe.method != LINEAR and (path := sidecar_path(model)) is not None:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            digests = [file_digest(file) for file in files if file.is_file()]
            key[f"sidecar of {model.name}"] = _digest(" ".join(digests).encode())
    for one in subjects:
        key[f"held-back rows of {one.model.name}"] = one.samples.record.digest
        key[f"metric of {one.model.name}"] = one.metrics[0].name
        key[f"dtype of {one.model.name}"] = one.settings.dtype
    return key | {
        "--samples": str(samples),
        "--seed": str(options.seed),
        "--batch-size": str(options.batch_size),
        "--pooler": options.pooler,
        "device": str(device),
        **{f"version of {name}": version(name) for name in _LIBRARIES},
    }


_LIBRARIES = ("fisher-mask-mergekit", "mergekit", "torch", "transformers", "optuna")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
