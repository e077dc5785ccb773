"""The merge method ``fisher_diagonal``."""

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
from fisher_mask_mergekit.merging import Missing, merge_errors, told
from fisher_mask_mergekit.parameter_merge import NormalizeParameters, merge_parameters


class FisherDiagonalMerge(GroupMergeMethod):
    """Every parameter by its own Fisher information.

    Parameters in the recipe, per model:

    - ``weight``: lambda, as in ``fisher_mask``.
    - ``sidecar``: folder of the model's sidecar, if it is neither beside the checkpoint nor in the cache.

    Parameters for the merge:

    - ``normalize``: ``none``; ``model`` or ``tensor``, which divide a model's Fisher information by its own mean over
      all parameters, or over the tensor's.
    - ``prior``, ``clip``: as in ``fisher_mask``.
    - ``missing``: ``error`` or ``average``, if a model has no sidecar.
    """

    spec = MergeMethodSpec(
        name="fisher_diagonal",
        pretty_name="Diagonal Fisher",
        reference_url="https://arxiv.org/abs/2111.09832",
        contract=InputContract(base=BasePolicy.IGNORED, min_inputs=1),
        parameters=(
            ParameterSpec("weight", told("weight", float | None), ParameterScope.INPUT, default=None),
            ParameterSpec("sidecar", told("sidecar", str), ParameterScope.INPUT, default=""),
            ParameterSpec(
                "normalize", told("normalize", NormalizeParameters), ParameterScope.SHARED, default="none"
            ),
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
            return merge_parameters(group, name, kind="diagonal", **parameters)


fisher_diagonal = FisherDiagonalMerge()
install()  # Imported before mergekit was, this module was not complete when the hook ran.
