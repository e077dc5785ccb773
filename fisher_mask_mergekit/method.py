"""The merge method ``fisher_mask``."""

import logging
import shlex
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import click
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)
from torch import Tensor

from fisher_mask_mergekit import store
from fisher_mask_mergekit.autoload import install
from fisher_mask_mergekit.checkpoint import Checkpoint
from fisher_mask_mergekit.errors import (
    FisherMaskError,
    SidecarError,
    SidecarMismatchError,
    SidecarNotFoundError,
)
from fisher_mask_mergekit.sidecar import Sidecar, read
from fisher_mask_mergekit.weighting import (
    Found,
    Normalize,
    Unmasked,
    counted_weight,
    fisher_rows,
    merge_rows,
)

Missing = Literal["error", "average"]


class MergeError(FisherMaskError, click.ClickException):
    """What mergekit's commands print as one line, without a traceback."""


class FisherMaskMerge(GroupMergeMethod):
    """Query and key rows by head Fisher, FFN intermediate rows by neuron Fisher, the rest averaged.

    Parameters in the recipe, per model:

    - ``weight``: lambda of eq. 5, default 1. The ``base_model`` counts only where it is given one; else it
      supplies configuration and tokenizer, and the tensors that no other model has.
    - ``sidecar``: path of the model's sidecar, if it is neither beside the checkpoint nor in the cache.

    Parameters for the merge:

    - ``normalize``: ``none``; ``model`` or ``layer``, which divide a model's Fisher information by its own
      mean over all nodes of the same kind, in the checkpoint or at the site.
    - ``unmasked``: how tensors without mask nodes are weighted, by ``weight`` alone (``average``) or as the
      paper's released code does: ``layer``, the rest of an attention or FFN block by the site's mean Fisher;
      ``universal``, also everything else, by the mean over sites of the mean head plus the mean neuron.
    - ``missing``: ``error`` or ``average``, if a model has no sidecar.
    """

    spec = MergeMethodSpec(
        name="fisher_mask",
        pretty_name="Fisher mask nodes",
        reference_url="https://arxiv.org/abs/2403.09891",
        contract=InputContract(base=BasePolicy.IGNORED, min_inputs=1),
        parameters=(
            ParameterSpec("weight", float | None, ParameterScope.INPUT, default=None),
            ParameterSpec("sidecar", str, ParameterScope.INPUT, default=""),
            ParameterSpec("normalize", Normalize, ParameterScope.SHARED, default="none"),
            ParameterSpec("unmasked", Unmasked, ParameterScope.SHARED, default="average"),
            ParameterSpec("missing", Missing, ParameterScope.SHARED, default="error"),
        ),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge the inputs of one output tensor.

        Args:
            group: The inputs.
            **parameters: As in :attr:`spec`, bound by mergekit.

        Raises:
            MergeError: If a sidecar is missing, cannot be used, or is another checkpoint's; or if the
                weights cannot be used.
        """
        name = group.metadata.name or ""
        try:
            return _merge(group, name, **parameters)
        except FisherMaskError as error:
            raise MergeError(f"{type(error).__name__} at {name}: {error}") from error


def _merge(
    group: TensorGroup,
    name: str,
    weight: Mapping[Hashable, float | None],
    sidecar: Mapping[Hashable, str],
    normalize: Normalize,
    unmasked: Unmasked,
    missing: Missing,
) -> Tensor:
    if group.base is not None and not group.non_base:
        return group.base.tensor
    # In an order of their own, so that not even the rounding depends on the recipe's.
    entries = sorted(group.entries, key=lambda entry: str(entry.id))
    weights = [counted_weight(entry.id, weight[entry.id], entry.is_base) for entry in entries]
    counted = [(entry, given) for entry, given in zip(entries, weights, strict=True) if given > 0]
    if not counted:
        raise FisherMaskError("every model has weight 0")
    if len(counted) == 1:
        if group.base is not None and weight[group.base.id] is None:
            _say_base_does_not_count(str(group.base.id), str(counted[0][0].id))
        return counted[0][0].tensor
    tensors, weights = [entry.tensor for entry, _ in counted], [given for _, given in counted]
    sidecars = [_sidecar(entry.id, sidecar[entry.id], missing) for entry, _ in counted]
    _compare_measurements(frozenset(_measurement(known) for known in sidecars if known is not None))
    found = [
        None if known is None else _identify(known, name, entry)
        for (entry, _), known in zip(counted, sidecars, strict=True)
    ]
    return merge_rows(tensors, weights, fisher_rows(sidecars, found, tensors[0].ndim, normalize, unmasked))


@lru_cache(maxsize=64)
def _say_base_does_not_count(base: str, model: str) -> None:
    """Warn, once: mergekit does not say whether a base model is one of the models that a recipe lists."""
    logging.getLogger(__name__).warning(
        "base_model %s has no weight, so it does not count, and what remains is %s as it is; "
        "to merge the two, list it under models with  parameters: {weight: 1.0}",
        base,
        model,
    )


@lru_cache(maxsize=64)
def _say_averaged(model: str) -> None:
    """Warn, once per model."""
    logging.getLogger(__name__).warning(
        "there is no sidecar for %s: all models are averaged by weight", model
    )


def _measurement(sidecar: Sidecar) -> tuple[str, ...]:
    settings = sidecar.metadata.settings
    return settings.estimator, settings.mask_placement, settings.labels, settings.loss


@lru_cache(maxsize=64)
def _compare_measurements(kinds: frozenset[tuple[str, ...]]) -> None:
    """Warn, once, of Fisher information that was not measured alike: its scales do not compare."""
    if len(kinds) > 1:
        logging.getLogger(__name__).warning(
            "the models were not measured alike (estimator, mask_placement, labels, loss): %s; "
            "measure them with the same settings, or set normalize",
            "; ".join(", ".join(kind) for kind in sorted(kinds)),
        )


def _identify(sidecar: Sidecar, name: str, entry: TensorEntry) -> Found:
    try:
        return sidecar.identify(name, entry.tensor)
    except SidecarMismatchError as error:
        raise SidecarMismatchError(
            f"{entry.id}: {error}\n  Measure this checkpoint:  {_compute_command(entry.id)}"
        ) from error


def _sidecar(model: Hashable, given: str, missing: Missing) -> Sidecar | None:
    checkpoint = _checkpoint(model)
    if given:
        path: Path | None = Path(given).expanduser()
    else:
        path = store.find(checkpoint) if checkpoint else None
    if path is None:
        if missing == "average":
            _say_averaged(str(model))
            return None
        raise SidecarNotFoundError(f"there is no sidecar for {model}. Measure it:  {_compute_command(model)}")
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise SidecarError(f"cannot read sidecar {path}: {getattr(error, 'strerror', error)}") from error
    return _read_once(path, state.st_mtime_ns, state.st_size)


def _compute_command(model: Hashable) -> str:
    """What to run to measure a model: the recipe that mergekit-yaml is running says on what."""
    context = click.get_current_context(silent=True)
    if context is not None and context.command.name == "mergekit-yaml":
        return f"mergekit-fisher compute {shlex.quote(context.params['config_file'])}"
    return f"mergekit-fisher compute {shlex.quote(str(model))} --data DATASET"


@lru_cache(maxsize=64)
def _read_once(path: Path, modified: int, size: int) -> Sidecar:
    return read(path)


def _checkpoint(model: Hashable) -> Checkpoint | None:
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
    # mergekit has the snapshot already, wherever its options say.
    folder = Path(LoaderCache().get(model).index.base_path)
    return Checkpoint(str(reference), folder, folder.name)


fisher_mask = FisherMaskMerge()
install()  # Imported before mergekit was, this module was not complete when the hook ran.
