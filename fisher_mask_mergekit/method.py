"""The merge method ``fisher_mask``."""

import logging
import shlex
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import click
import torch
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
from fisher_mask_mergekit.sites import Node, Site, row_fisher

Normalize = Literal["none", "model", "layer"]
Unmasked = Literal["average", "layer", "universal"]
Missing = Literal["error", "average"]


class MergeError(FisherMaskError, click.ClickException):
    """What mergekit's commands print as one line, without a traceback."""


def merge_rows(
    tensors: Sequence[Tensor], weights: Sequence[float], fishers: Sequence[Tensor] | None = None
) -> Tensor:
    r"""Fisher-weighted mean of tensors, row by row.

    .. math:: \theta^* = \frac{\sum_j \lambda_j F_j \theta_j}{\sum_j \lambda_j F_j}

    Rows where every :math:`\lambda_j F_j` is zero, and all rows if no Fisher information is given, take the
    mean weighted by :math:`\lambda_j` alone. There is no floor: only the ratios of the F matter.

    Args:
        tensors: :math:`\theta_j`, each ``[R, ...]``, all of one shape and dtype. Not changed.
        weights: :math:`\lambda_j \ge 0`, at least one positive.
        fishers: :math:`F_j`, non-negative, of one shape that broadcasts to the tensors': ``[R, 1]`` for
            the rows of a matrix.

    Returns:
        :math:`\theta^*`, of the inputs' dtype; computed in float32, or float64 if that is the inputs'.

    Reference: arXiv 2403.09891, eq. (5).
    """
    first = tensors[0]
    # mergekit's executor for many GPUs makes the thread's GPU the default for new tensors.
    plain = torch.tensor(weights, dtype=torch.float64, device="cpu")
    plain = plain / plain.max()  # So that no sum overflows.
    plain = plain.reshape(-1, *[1] * first.ndim)
    share = plain / plain.sum()
    if fishers is not None:
        weighted = plain * torch.stack([fisher.to("cpu", torch.float64) for fisher in fishers])
        total = weighted.sum(0)
        share = torch.where(total > 0, weighted / total, share)
    dtype = torch.promote_types(first.dtype, torch.float32)
    share = share.to(first.device, dtype)
    merged = torch.zeros_like(first, dtype=dtype)
    for tensor, part in zip(tensors, share, strict=True):
        merged.addcmul_(tensor, part)
    return merged.to(first.dtype)


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
    weights = [_weight(entry, weight[entry.id]) for entry in entries]
    counted = [(entry, given) for entry, given in zip(entries, weights, strict=True) if given > 0]
    if not counted:
        raise FisherMaskError("every model has weight 0")
    if len(counted) == 1:
        return counted[0][0].tensor
    tensors, weights = [entry.tensor for entry, _ in counted], [given for _, given in counted]
    sidecars = [_sidecar(entry.id, sidecar[entry.id], missing) for entry, _ in counted]
    _compare_measurements(frozenset(_measurement(known) for known in sidecars if known is not None))
    fishers: list[Tensor] = []
    for (entry, _), known in zip(counted, sidecars, strict=True):
        fisher = None if known is None else _fisher(known, name, entry, normalize, unmasked)
        if fisher is not None:
            fishers.append(fisher)
    if not fishers or None in sidecars:
        return merge_rows(tensors, weights)
    if len(fishers) < len(counted) or len({fisher.shape for fisher in fishers}) > 1:
        raise SidecarMismatchError("the models' sidecars disagree about which mask nodes govern this tensor")
    return merge_rows(tensors, weights, fishers)


def _measurement(sidecar: Sidecar) -> tuple[str, str, str]:
    settings = sidecar.metadata.settings
    return settings.estimator, settings.mask_placement, settings.labels


@lru_cache(maxsize=64)
def _compare_measurements(kinds: frozenset[tuple[str, str, str]]) -> None:
    """Warn, once, of Fisher information that was not measured alike: its scales do not compare."""
    if len(kinds) > 1:
        logging.getLogger(__name__).warning(
            "the models were not measured alike (estimator, mask_placement, labels): %s; "
            "measure them with the same settings, or set normalize",
            "; ".join(", ".join(kind) for kind in sorted(kinds)),
        )


def _weight(entry: TensorEntry, given: float | None) -> float:
    if given is None:
        return 0.0 if entry.is_base else 1.0
    if not 0 <= given < float("inf"):
        raise FisherMaskError(f"weight of {entry.id} is {given}; expected a number of 0 or more")
    return given


def _fisher(
    sidecar: Sidecar, name: str, entry: TensorEntry, normalize: Normalize, unmasked: Unmasked
) -> Tensor | None:
    """What one model's tensor is weighted by, broadcast to its shape; None for not at all."""
    try:
        found = sidecar.identify(name, entry.tensor)
    except SidecarMismatchError as error:
        raise SidecarMismatchError(
            f"{entry.id}: {error}\n  Measure this checkpoint:  {_compute_command(entry.id)}"
        ) from error
    if found is not None and found[1].layout != "mean":
        site, governed = found
        plain = torch.ones(1, dtype=torch.float64, device="cpu")
        if unmasked != "average" and site.kind == "attention":
            plain = _site_mean(sidecar, site, normalize)
        return row_fisher(site, governed, _normalized(sidecar, site, normalize), plain)
    if unmasked == "average":
        return None
    if found is not None:
        return _broadcast(_site_mean(sidecar, found[0], normalize), entry.tensor)
    return _broadcast(_universal(sidecar, normalize), entry.tensor) if unmasked == "universal" else None


def _site_mean(sidecar: Sidecar, site: Site, normalize: Normalize) -> Tensor:
    """Mean Fisher information of a site's heads or neurons, ``[1]``."""
    node: Node = "neuron_fisher" if site.kind == "ffn" else "head_fisher"
    return _normalized(sidecar, site, normalize)[node].mean().reshape(1)


def _broadcast(fisher: Tensor, tensor: Tensor) -> Tensor:
    return fisher.reshape([1] * tensor.ndim)


@lru_cache(maxsize=64)
def _universal(sidecar: Sidecar, normalize: Normalize) -> Tensor:
    """Mean over attention sites of their mean plus mean over FFN sites of theirs, ``[1]``."""
    total = torch.zeros(1, dtype=torch.float64, device="cpu")
    for kind in ("attention", "ffn"):
        means = [_site_mean(sidecar, site, normalize) for site in sidecar.metadata.sites if site.kind == kind]
        if means:
            total += torch.cat(means).mean()
    return total


def _normalized(sidecar: Sidecar, site: Site, normalize: Normalize) -> dict[Node, Tensor]:
    """The site's Fisher vectors in float64, divided by the mean that ``normalize`` names."""
    vectors = {node: vector.double() for node, vector in sidecar.fisher[site.output].items()}
    if normalize == "none":
        return vectors
    means = (
        sidecar.means
        if normalize == "model"
        else {node: float(vector.mean()) for node, vector in vectors.items()}
    )
    return {node: vector / means[node] if means[node] > 0 else vector for node, vector in vectors.items()}


def _sidecar(model: Hashable, given: str, missing: Missing) -> Sidecar | None:
    checkpoint = _checkpoint(model)
    if given:
        path: Path | None = Path(given).expanduser()
    else:
        path = store.find(checkpoint) if checkpoint else None
    if path is None:
        if missing == "average":
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
