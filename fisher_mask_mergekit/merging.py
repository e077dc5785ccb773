"""What the merge methods have in common: which inputs count, and each one's sidecar.

Nothing here loads mergekit: its registry asks for one method while another is being imported.
"""

import logging
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import click
from pydantic import ValidationError, WrapValidator
from torch import Tensor

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.checkpoint import Checkpoint, model_files, tensor_shapes
from fisher_mask_mergekit.diagonal_sidecar import INDEX, DiagonalSidecar
from fisher_mask_mergekit.errors import (
    CheckpointError,
    FisherMaskError,
    SidecarError,
    SidecarMismatchError,
    SidecarNotFoundError,
)
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.parameter_records import AnyRecord, ParameterSidecar
from fisher_mask_mergekit.recipe import RecipeModel, read_recipe
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sidecar import Measurement, OfAnyKind, Sidecar, whole
from fisher_mask_mergekit.weighting import Found, Prior, check_parent, counted_weight

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorEntry, TensorGroup

Missing = Literal["error", "average"]
ParameterKind = Literal["diagonal", "factored"]


class MergeError(FisherMaskError, click.ClickException):
    """What mergekit's commands print as one line, without a traceback."""


@contextmanager
def merge_errors(group: "TensorGroup") -> Iterator[str]:
    """Gives the output tensor's name, and says it of whatever is wrong.

    Raises:
        MergeError: In place of this package's other errors.
    """
    name = group.metadata.name or ""
    try:
        yield name
    except FisherMaskError as error:
        raise MergeError(f"{type(error).__name__} at {name}: {error}") from error


def told(name: str, values: Any) -> Any:
    """A parameter's type, of which a wrong value is a line: pydantic's own error would be a traceback.

    Args:
        name: The parameter's.
        values: Its type.
    """

    def validate(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise MergeError(f"RecipeError: {name}: {error.errors()[0]['msg']}, got {value!r:.80}") from error

    return Annotated[values, WrapValidator(validate)]


def counted_inputs(
    group: "TensorGroup", weight: Mapping[Hashable, float | None]
) -> "Tensor | list[tuple[TensorEntry, float]]":
    """The inputs that count, and the weight of each; the merged tensor itself where that is a single input.

    In an order of their own, so that not even the rounding depends on the recipe's.

    Raises:
        FisherMaskError: If none counts, or a weight cannot be used.
    """
    if group.base is not None and not group.non_base:
        return group.base.tensor
    entries = sorted(group.entries, key=lambda entry: str(entry.id))
    weights = [counted_weight(entry.id, weight[entry.id], entry.is_base) for entry in entries]
    counted = [(entry, given) for entry, given in zip(entries, weights, strict=True) if given > 0]
    if not counted:
        raise FisherMaskError("every model has weight 0")
    if len(counted) == 1:
        if group.base is not None and weight[group.base.id] is None:
            _say_base_does_not_count(str(group.base.id), str(counted[0][0].id))
        return counted[0][0].tensor
    return counted


def prior_of(
    group: "TensorGroup", weight: Mapping[Hashable, float | None], precision: float, clip: bool
) -> Prior | None:
    """What the models of a group start from; None if they are averaged.

    Args:
        group: The inputs.
        weight: As recipes have it.
        precision: The recipe's ``prior``.
        clip: The recipe's.

    Raises:
        RecipeError: If there is no base model, or it is one of those that are merged.
    """
    if not precision:
        return None
    check_parent(precision, group.base and group.base.id, group.base and weight[group.base.id])
    assert group.base is not None
    return Prior(precision, group.base.tensor, clip)


@lru_cache(maxsize=64)
def _say_base_does_not_count(base: str, model: str) -> None:
    """Warn, once: mergekit does not say whether a base model is one of the models that a recipe lists."""
    logging.getLogger(__name__).warning(
        "base_model %s has no weight, so it does not count, and what remains is %s as it is; "
        "to merge the two, list it under models with  parameters: {weight: 1.0}",
        base,
        model,
    )


def compare_measurements(sidecars: Sequence[OfAnyKind | None]) -> None:
    """Warn of Fisher information that was not measured alike: its scales do not compare."""
    _warn_of_kinds(frozenset(_measurement(known.metadata) for known in sidecars if known is not None))


def _measurement(metadata: Measurement) -> tuple[str, ...]:
    settings = metadata.settings
    return settings.estimator, settings.mask_placement, settings.labels, settings.loss


@lru_cache(maxsize=64)
def _warn_of_kinds(kinds: frozenset[tuple[str, ...]]) -> None:
    """Once."""
    if len(kinds) > 1:
        logging.getLogger(__name__).warning(
            "the models were not measured alike (estimator, mask_placement, labels, loss): %s; "
            "measure them with the same settings, or set normalize",
            "; ".join(", ".join(kind) for kind in sorted(kinds)),
        )


@overload
def find_sidecar(model: Hashable, given: str, kind: Literal["mask"], missing: Missing) -> Sidecar | None: ...
@overload
def find_sidecar(
    model: Hashable, given: str, kind: ParameterKind, missing: Missing
) -> DiagonalSidecar | FactoredSidecar | None: ...
def find_sidecar(model: Hashable, given: str, kind: Kind, missing: Missing) -> AnySidecar | None:
    """A model's sidecar, where the recipe says it is, else beside the checkpoint or in the cache.

    It is read once, not once per tensor.

    Args:
        model: mergekit's id of the input.
        given: The recipe's ``sidecar``, if any.
        kind: What it must be.
        missing: What to do if there is none.

    Returns:
        None if there is none and that is no error.

    Raises:
        SidecarError: If there is none, or it cannot be used.
    """
    path = store.sidecar_of(given, _checkpoint(model), kind)
    if path is None:
        if missing == "average":
            _say_averaged(str(model))
            return None
        command = compute_command(model, kind)
        raise SidecarNotFoundError(f"there is no sidecar for {model}. Measure it:  {command}")
    file = path / INDEX if kind == "diagonal" else path  # A folder does not change when a file in it does.
    try:
        state = file.stat()
    except (OSError, ValueError) as error:
        raise SidecarError(f"cannot read sidecar {file}: {getattr(error, 'strerror', error)}") from error
    return whole(_read(path, kind, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=64)
def _read(path: Path, kind: Kind, modified: int, size: int) -> AnySidecar:
    return read_any(path, kind)


@overload
def identified(sidecar: Sidecar, name: str, entry: "TensorEntry", kind: Kind) -> Found: ...
@overload
def identified(
    sidecar: ParameterSidecar, name: str, entry: "TensorEntry", kind: Kind
) -> AnyRecord | None: ...
def identified(
    sidecar: Sidecar | ParameterSidecar, name: str, entry: "TensorEntry", kind: Kind
) -> Found | AnyRecord:
    """What a sidecar knows of an input's tensor, and what to do if it is another checkpoint's.

    One of mask nodes does not know every tensor, but some of its checkpoint's.

    Args:
        sidecar: The input's.
        name: The output tensor's.
        entry: The input.
        kind: The sidecar's.

    Raises:
        SidecarMismatchError: If it is another checkpoint's.
    """
    try:
        found = sidecar.identify(name, entry.tensor)
        if isinstance(sidecar, Sidecar) and found is None:
            _check_governs(sidecar, entry.id)
        return found
    except SidecarMismatchError as error:
        raise SidecarMismatchError(
            f"{entry.id}: {error}\n  Measure this checkpoint:  {compute_command(entry.id, kind)}"
        ) from error


@lru_cache(maxsize=64)
def _check_governs(sidecar: Sidecar, model: Hashable) -> None:
    """Once: else each tensor of another architecture would be one that the sidecar need not know.

    Raises:
        SidecarMismatchError: If none of the tensors that it governs is one of the model's.
    """
    checkpoint, file = _checkpoint(model), Path(getattr(getattr(model, "model", None), "path", ""))
    try:
        if checkpoint is None or (file.is_file() and file not in model_files(checkpoint)):
            return  # In no files, or in one that need not hold all of a checkpoint.
        names = tensor_shapes(checkpoint)
    except CheckpointError:
        return  # What mergekit reads lies elsewhere, as an applied adapter does.
    if not sidecar.governs_any(names):
        raise SidecarMismatchError(
            f"sidecar '{sidecar.source}' was measured on {sidecar.metadata.described_checkpoint}, a "
            f"{sidecar.metadata.architecture}, and governs none of the tensors here"
        )


@lru_cache(maxsize=64)
def _say_averaged(model: str) -> None:
    """Warn, once per model."""
    logging.getLogger(__name__).warning(
        "there is no sidecar for %s: all models are averaged by weight", model
    )


def compute_command(model: Hashable, kind: Kind = "mask") -> str:
    """What to run to measure a model: the recipe that mergekit-yaml is running says on what."""
    context = click.get_current_context(silent=True)
    if context is not None and context.command.name == "mergekit-yaml":
        path = context.params["config_file"]
        command = f"mergekit-fisher compute {shlex.quote(path)}"
        return with_own_sidecar(_models(Path(path)), str(model), command)
    option = "" if kind == "mask" else f" --kind {kind}"
    return f"mergekit-fisher compute {shlex.quote(str(model))}{option} --data DATASET"


def with_own_sidecar(models: Sequence[RecipeModel], name: str, command: str) -> str:
    """How to measure a model of a recipe, where what the recipe names as its sidecar is in the way of that.

    Nothing measured here replaces what is on the hub, and one file holds one model's.
    """
    named = {model.name: model.sidecar for model in models}
    sidecar = named.get(name)
    if sidecar and sidecar.startswith(hub.PREFIX):
        return f"change or remove  sidecar: {sidecar}  first, then:  {command}"
    if sidecar and list(named.values()).count(sidecar) > 1:
        return f"give each model that names  sidecar: {sidecar}  one of its own first, then:  {command}"
    return command


def _models(path: Path) -> tuple[RecipeModel, ...]:
    try:
        return read_recipe(path).models
    except FisherMaskError:  # The recipe is not what went wrong.
        return ()


def _checkpoint(model: Any) -> Checkpoint | None:
    """The files behind one of mergekit's input ids; None if it stands for none, as in-memory inputs do."""
    reference = getattr(model, "model", None)
    if reference is None:
        return None
    path = Path(reference.path)
    if getattr(model, "lora", None) is not None:
        return Checkpoint(str(model), path, None)
    if path.is_file():  # mergekit-pytorch names weight files.
        return Checkpoint(str(path.parent), path.parent, None)
    if path.is_dir():
        return Checkpoint(reference.path, path, None)
    from mergekit.io.tasks import LoaderCache

    # mergekit has the snapshot already, wherever its options say.
    folder = Path(LoaderCache().get(model).index.base_path)
    return Checkpoint(str(reference), folder, folder.name)
