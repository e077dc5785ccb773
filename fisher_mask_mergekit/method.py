"""The merge method ``fisher_mask``."""

from collections.abc import Hashable, Mapping
from typing import Any

from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)
from torch import Tensor

from fisher_mask_mergekit.autoload import install
from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.merging import (
    Missing,
    compare_measurements,
    counted_inputs,
    find_sidecar,
    identified,
    merge_errors,
    prior_of,
    told,
)
from fisher_mask_mergekit.parameter_merge import NormalizeParameters, merge_parameters
from fisher_mask_mergekit.recipe import ALL, Nodes
from fisher_mask_mergekit.weighting import Normalize, Scheme, Unmasked, fisher_rows, merge_rows


class FisherMaskMerge(GroupMergeMethod):
    """Query and key rows by head Fisher, FFN intermediate rows by neuron Fisher, the rest averaged; more if asked.

    Parameters in the recipe, per model:

    - ``weight``: lambda of eq. 5, default 1. The ``base_model`` counts only where it is given one; else it
      supplies configuration and tokenizer, and the tensors that no other model has.
    - ``sidecar``: path of the model's sidecar, or ``hub:org/repo/path.safetensors@revision``, if it is neither beside
      the checkpoint nor in the cache.

    Parameters for the merge:

    - ``nodes``: ``paper``; ``columns``, which weighs the FFN's output projection too, its columns by neuron Fisher; or
      ``all``: every parameter by the Fisher information that its row and its column make of it, from sidecars of kind
      factored. Then ``normalize`` is ``none``, or ``model`` or ``tensor``: the mean over all parameters, or the tensor's.
    - ``values``: ``true`` weighs the values too: their rows by the key-value heads' Fisher, and the columns of the
      attention's output projection by the heads'.
    - ``normalize``: ``none``; ``model`` or ``layer``, which divide a model's Fisher information by its own
      mean over all nodes of the same kind, in the checkpoint or at the site; ``tensor``, by its mean over the
      tensor's rows (or columns).
    - ``unmasked``: how tensors without mask nodes are weighted, by ``weight`` alone (``average``) or as the
      paper's released code does: ``layer``, the rest of an attention or FFN block by the site's mean Fisher;
      ``universal``, also everything else, by the mean over sites of the mean head plus the mean neuron.
    - ``prior``: how much the ``base_model``, which the models were fine-tuned from, is known to be right, in units of a
      model's mean Fisher information; with it changes from the base are added up rather than averaged. 0, the
      default: the base does not count. Needs a ``normalize``.
    - ``clip``: ``true`` keeps what a ``prior`` adds up between the least and the greatest value that the base and the models
      have, element by element. Without one it changes nothing.
    - ``missing``: ``error`` or ``average``, if a model has no sidecar.
    """

    spec = MergeMethodSpec(
        name="fisher_mask",
        pretty_name="Fisher mask nodes",
        reference_url="https://arxiv.org/abs/2403.09891",
        contract=InputContract(base=BasePolicy.IGNORED, min_inputs=1),
        parameters=(
            ParameterSpec("weight", told("weight", float | None), ParameterScope.INPUT, default=None),
            ParameterSpec("sidecar", told("sidecar", str), ParameterScope.INPUT, default=""),
            ParameterSpec("nodes", told("nodes", Nodes), ParameterScope.SHARED, default="paper"),
            ParameterSpec("values", told("values", bool), ParameterScope.SHARED, default=False),
            ParameterSpec("normalize", told("normalize", Normalize), ParameterScope.SHARED, default="none"),
            ParameterSpec("unmasked", told("unmasked", Unmasked), ParameterScope.SHARED, default="average"),
            ParameterSpec("prior", told("prior", float), ParameterScope.SHARED, default=0.0),
            ParameterSpec("clip", told("clip", bool), ParameterScope.SHARED, default=False),
            ParameterSpec("missing", told("missing", Missing), ParameterScope.SHARED, default="error"),
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
        with merge_errors(group) as name:
            return _merge(group, name, **parameters)


def _merge(
    group: TensorGroup,
    name: str,
    weight: Mapping[Hashable, float | None],
    sidecar: Mapping[Hashable, str],
    missing: Missing,
    **scheme: Any,
) -> Tensor:
    if scheme["nodes"] == ALL:
        normalize, prior, clip = _without_masks(**scheme)
        return merge_parameters(group, name, weight, sidecar, normalize, prior, clip, missing, "factored")
    by, inputs = Scheme(**scheme), counted_inputs(group, weight)
    if isinstance(inputs, Tensor):
        return inputs
    start = prior_of(group, weight, by.prior, by.clip)
    sidecars = [find_sidecar(entry.id, sidecar[entry.id], "mask", missing) for entry, _ in inputs]
    compare_measurements(sidecars)
    found = [
        None if known is None else identified(known, name, entry, "mask")
        for (entry, _), known in zip(inputs, sidecars, strict=True)
    ]
    tensors, weights = [entry.tensor for entry, _ in inputs], [given for _, given in inputs]
    fishers = fisher_rows(sidecars, found, tensors[0].ndim, by)
    return merge_rows(tensors, weights, fishers, start)


def _without_masks(
    nodes: Nodes, values: bool, normalize: Normalize, unmasked: Unmasked, prior: float, clip: bool
) -> tuple[NormalizeParameters, float, bool]:
    """Refuse what has no meaning where all tensors are weighed by numbers of their own."""
    if values:
        raise RecipeError("values: true is about masks; nodes: all weighs the values, too, as it is")
    if unmasked != "average":
        raise RecipeError(
            f"unmasked: {unmasked} is about tensors without mask nodes; nodes: {nodes} leaves none"
        )
    if normalize == "layer":
        raise RecipeError("normalize: layer is about sites of masks; nodes: all takes none, model or tensor")
    return normalize, prior, clip


fisher_mask = FisherMaskMerge()
install()  # Imported before mergekit was, this module was not complete when the hook ran.
