"""Rows to tune on: of each model's training data those that were not measured on, and never those reported on."""

from collections.abc import Iterable
from pathlib import Path
from sys import maxsize

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import locate
from fisher_mask_mergekit.data import DataSpec, load_samples, parse_spec, row_lines
from fisher_mask_mergekit.diagonal_sidecar import read_diagonal
from fisher_mask_mergekit.errors import DataError, FisherMaskError, RecipeError, SidecarError
from fisher_mask_mergekit.evaluation.plan import Options, Subject, evaluation_data, subject_of
from fisher_mask_mergekit.heads import short_names
from fisher_mask_mergekit.loading import load_config
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.sidecar import Measurement, read
from fisher_mask_mergekit.tasks import task_of


def held_back(recipe: Recipe, samples: int, options: Options) -> list[Subject]:
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
    _refuse_reporting_data(recipe, models)
    names = short_names([model.name for model in models])
    found = [_subject(name, model, samples, options) for name, model in zip(names, models, strict=True)]
    for subject in found:
        _refuse_reported_rows(recipe, subject)
    return found


def _subject(name: str, model: RecipeModel, samples: int, options: Options) -> Subject:
    seed, measured = _measured(model, trust_remote_code=options.trust_remote_code)
    settings = model.request.model_copy(update={"samples": samples, "seed": seed})
    try:
        return subject_of(name, model, settings, options, skip=measured)
    except DataError as error:
        if "none is left" in str(error):
            raise DataError(
                f"{error} to hold back: {model.name} is measured on all of them; measure it on fewer:  "
                "fisher: {samples: N}"
            ) from error
        raise


def _measured(model: RecipeModel, *, trust_remote_code: bool) -> tuple[int, int]:
    """Seed and number of the rows measured on: the sidecar's if it was measured on this data, else the recipe's."""
    request = model.request
    known = sidecar_of(model)
    if known is not None:
        again = known.settings.model_copy(update={"data": request.data, "samples": known.samples})
        try:
            config = load_config(locate(model.name), trust_remote_code=trust_remote_code)
            drawn = load_samples(again, task_of(config, model.name, again))
        except FisherMaskError:  # Of other data, whose columns this one does not have.
            return request.seed, request.samples
        if drawn.record.digest == known.data.digest:
            return again.seed, known.samples
    return request.seed, request.samples


def sidecar_of(model: RecipeModel) -> Measurement | None:
    """What the sidecar that a merge would use says; None if there is none that can be read."""
    path = sidecar_path(model)
    try:
        if path is None:
            return None
        return (read(path) if model.kind == "mask" else read_diagonal(path)).metadata
    except SidecarError:  # A merge that needs it says so.
        return None


def sidecar_path(model: RecipeModel) -> Path | None:
    """Where a merge looks for a model's sidecar."""
    if model.sidecar:
        return Path(model.sidecar).expanduser()
    return store.find(locate(model.name), model.kind)


def _reporting(model: RecipeModel) -> DataSpec | None:
    """What `evaluate` would score a model on; None if that is not said."""
    try:
        return parse_spec(evaluation_data(model.request, model.evaluation.eval))
    except DataError:
        return None


def _refuse_reporting_data(recipe: Recipe, models: Iterable[RecipeModel]) -> None:
    models = list(models)
    for model in models:
        own = _tables(parse_spec(model.request.data or ""))
        for other in models:
            spec = _reporting(other)
            if spec is not None and own & _tables(spec):
                raise RecipeError(
                    f"{recipe.path}: a tuning run was asked to use the reporting split: {model.name} has data "
                    f"'{model.request.data}', which is what merges are evaluated on for {other.name}; give it its "
                    "training data, or evaluate on other rows:  fisher: {eval: DATASET}"
                )


def _tables(spec: DataSpec) -> set[tuple[object, ...]]:
    """What names a data set's tables alike however they are written; the revision does not count."""
    splits = spec.split.split("+")
    if not spec.is_local:
        return {(spec.path, spec.config or "default", split) for split in splits}
    path = Path(spec.path).resolve()
    if path.is_file():
        state = path.stat()  # Another name of the same file is the same file.
        return {(state.st_dev, state.st_ino)}
    if spec.is_one_table:
        return {(str(path),)}
    if (path / "dataset_dict.json").is_file():
        return {(str(path / split),) for split in splits}
    return {(str(path), spec.config or "default", split) for split in splits}


def _refuse_reported_rows(recipe: Recipe, subject: Subject) -> None:
    """Where the reporting split is a local table: rows that are in it too, under whatever name."""
    spec = _reporting(subject.model)
    if spec is None or not spec.is_local:
        return
    settings = subject.settings.model_copy(update={"data": spec.text, "samples": maxsize})
    try:
        reported = load_samples(settings, subject.task)
    except DataError:  # `evaluate` will say so.
        return
    lines = set(row_lines(reported.texts, reported.labels))
    both = sum(line in lines for line in row_lines(subject.samples.texts, subject.samples.labels))
    if both:
        raise DataError(
            f"{recipe.path}: {both} of {len(subject.samples.labels)} rows held back of '{subject.settings.data}' are also "
            f"in the reporting split '{spec.text}'; take them out of one of the two"
        )
