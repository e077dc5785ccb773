"""Rows to tune on: of each model's training data those that were not measured on, and never those reported on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import locate
from fisher_mask_mergekit.data import DataSpec, load_samples, load_texts, parse_spec
from fisher_mask_mergekit.errors import DataError, FisherMaskError, RecipeError, SidecarError
from fisher_mask_mergekit.evaluation.plan import Options, Subject, evaluation_data, subject_of
from fisher_mask_mergekit.heads import short_names
from fisher_mask_mergekit.loading import load_config
from fisher_mask_mergekit.opening import read_any
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.settings import RANDOM
from fisher_mask_mergekit.sidecar import Measurement
from fisher_mask_mergekit.tasks import task_of


@dataclass(frozen=True)
class HeldBack:
    """What trials are scored on.

    Attributes:
        subjects: The recipe's models, each with its rows.
        notes: What could not be made sure of.
    """

    subjects: Sequence[Subject]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Measured:
    """Which rows of a model's data it was measured on: the first ``count`` drawn by ``seed``."""

    seed: int
    count: int
    note: str = ""


def held_back(recipe: Recipe, samples: int, options: Options) -> HeldBack:
    """What trials are scored on: rows of every model's training data that come after those measured.

    A measurement takes the first rows of a seeded permutation of the data; these are the next ones.

    Args:
        recipe: What is tuned.
        samples: How many rows per model; fewer where the data has fewer.
        options: How to evaluate.

    Raises:
        FisherMaskError: If a model has no data or none is left, or it is what merges are reported on.
    """
    models = [model for model in recipe.models if model.is_merged]
    for model in models:
        if model.settings is None:
            raise RecipeError(
                f"{recipe.path}: nothing says what {model.name} was trained on, of which tune holds rows back; "
                "add  fisher: {data: DATASET}  beside it"
            )
        if model.request.data == RANDOM:
            raise RecipeError(
                f"{recipe.path}: {model.name} has data '{RANDOM}', of which tune can hold nothing back; name what it was trained "
                "on as data, and its sidecar as it is:  parameters: {sidecar: PATH}"
            )
    _refuse_reporting_data(recipe, models)
    subjects, notes = [], []
    for name, model in zip(short_names([model.name for model in models]), models, strict=True):
        measured = _measured(model, trust_remote_code=options.trust_remote_code)
        subject = _subject(name, model, samples, measured, options)
        notes += [measured.note, _refuse_reported_rows(recipe, subject, measured)]
        subjects.append(subject)
    return HeldBack(subjects, tuple(note for note in notes if note))


def _subject(name: str, model: RecipeModel, samples: int, measured: _Measured, options: Options) -> Subject:
    settings = model.request.model_copy(update={"samples": samples, "seed": measured.seed})
    try:
        return subject_of(name, model, settings, options, skip=measured.count)
    except DataError as error:
        if "none is left" in str(error):
            raise DataError(
                f"{error} to hold back: {model.name} is measured on all of them; measure it on fewer:  "
                "fisher: {samples: N}"
            ) from error
        raise


def _measured(model: RecipeModel, *, trust_remote_code: bool) -> _Measured:
    """The sidecar's rows if it was measured on this data, else the recipe's."""
    request = model.request
    path = sidecar_path(model)
    if path is None:
        return _Measured(request.seed, request.samples)
    try:
        known: Measurement = read_any(path, model.kind).metadata
    except SidecarError as error:
        return _Measured(request.seed, request.samples, _unknown(model, str(error)))
    if known.settings.data == RANDOM:  # None of the data's rows.
        return _Measured(request.seed, 0)
    again = known.settings.model_copy(update={"data": request.data})
    try:
        config = load_config(locate(model.name), trust_remote_code=trust_remote_code)
        drawn = load_samples(again, task_of(config, model.name, again)).record
    except FisherMaskError as error:  # Of other data, for one, whose columns this one does not have.
        why = f"measured on '{known.settings.data}', whose rows cannot be drawn from this data ({error})"
        return _Measured(request.seed, request.samples, _unknown(model, f"{path} was {why}"))
    if drawn.digest != known.data.digest:
        why = f"{path} was measured on other rows (of '{known.settings.data}' as it was then)"
        return _Measured(request.seed, request.samples, _unknown(model, why))
    # As many as were drawn: those that held nothing to predict are among the first rows too.
    return _Measured(again.seed, min(again.samples, drawn.rows))


def _unknown(model: RecipeModel, why: str) -> str:
    request = model.request
    return (
        f"{model.name}: which rows of '{request.data}' it was measured on is not known: {why}. Held back are those "
        f"after the first {request.samples} by seed {request.seed}, as the recipe has it"
    )


def sidecar_path(model: RecipeModel) -> Path | None:
    """Where a merge looks for a model's sidecar."""
    return store.sidecar_of(model.sidecar, locate(model.name), model.kind)


def _reporting(model: RecipeModel) -> DataSpec | None:
    """What `evaluate` would score a model on; None if that is not said."""
    given = model.evaluation.eval
    if given is None and parse_spec(model.request.data or "").is_one_table:
        return None
    return parse_spec(evaluation_data(model.request, given))


def _refuse_reporting_data(recipe: Recipe, models: Iterable[RecipeModel]) -> None:
    models = list(models)
    for model in models:
        own = parse_spec(model.request.data or "")
        for other in models:
            spec = _reporting(other)
            if spec is not None and _overlap(own, spec):
                raise RecipeError(
                    f"{recipe.path}: a tuning run was asked to use the reporting split: {model.name} has data "
                    f"'{model.request.data}', which is what merges are evaluated on for {other.name}; give it its "
                    "training data, or evaluate on other rows:  fisher: {eval: DATASET}"
                )


def _overlap(one: DataSpec, other: DataSpec) -> bool:
    """Whether two names are of the same rows, or of some that are among the other's; the revision does not count."""
    return any(
        place == where and (split == part or "all" in (split, part))
        for place, split in _tables(one)
        for where, part in _tables(other)
    )


def _tables(spec: DataSpec) -> Iterator[tuple[object, str]]:
    """What names a data set's tables alike however they are written: where each is, and which split of that."""
    path = Path(spec.path).resolve()
    if path.is_file():
        state = path.stat()  # Another name of the same file is the same file.
        yield (state.st_dev, state.st_ino), ""
    elif spec.is_one_table:
        yield str(path), ""
    elif (path / "dataset_dict.json").is_file():
        yield from ((str(path / split), "") for split in spec.split.split("+"))
    else:
        place = str(path) if spec.is_local else spec.path
        yield from (((place, spec.config or "default"), split) for split in spec.split.split("+"))


def _refuse_reported_rows(recipe: Recipe, subject: Subject, measured: _Measured) -> str:
    """Rows that are in the reporting split too, under whatever name and whatever label; a note if it cannot be read."""
    spec = _reporting(subject.model)
    if spec is None:
        return ""
    own = load_texts(subject.settings, subject.task, skip=measured.count)
    try:
        reported = set(
            load_texts(
                subject.settings.model_copy(update={"data": spec.text, "samples": maxsize}), subject.task
            )
        )
    except DataError as error:
        return (
            f"{subject.model.name}: its held-back rows were not compared with those of the reporting split "
            f"'{spec.text}': {error}"
        )
    if both := sum(text in reported for text in own):
        raise DataError(
            f"{recipe.path}: {both} of {len(own)} rows held back of '{subject.settings.data}' are also in the reporting "
            f"split '{spec.text}'; take them out of one of the two"
        )
    return ""
