"""Each model's share of a tensor before the merge: from the plan and the sidecars, without the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import FisherMaskError, SidecarMismatchError
from fisher_mask_mergekit.preview.plan import Input, Output
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.sites import row_fisher
from fisher_mask_mergekit.weighting import Found, Scheme, check_prior, counted_weight, fisher_rows, shares


@dataclass(frozen=True)
class Forecast:
    """What a merge will make a tensor of.

    Attributes:
        output: The tensor.
        models: Those that count.
        shares: Per model its share of each row, ``[M, ...]``; ``[M]`` if weight alone decides.
        found: The site and what governs the rows; None if weight alone decides, or the mean over all sites.
        values: Whether value rows are weighed by Fisher information.
    """

    output: Output
    models: tuple[str, ...]
    shares: Tensor
    found: Found
    values: bool = False

    def rows(self) -> Tensor:
        """The shares of the rows (or columns) that mask nodes govern, ``[M, R]``: averaged values are left out."""
        flat = self.shares.flatten(1) if self.shares.ndim > 1 else self.shares[:, None]
        if self.found is None or self.found[1].layout == "mean":
            return flat
        site, tensor = self.found
        ones = {node: torch.ones(shape) for node, shape in site.nodes().items()}
        return flat[:, row_fisher(site, tensor, ones, torch.full((1,), float(self.values))).flatten() > 0]


def counted(output: Output) -> list[tuple[Input, float]]:
    """The models that a merge makes a tensor of, and their weights.

    Raises:
        FisherMaskError: If a weight is no number of 0 or more, or all are 0.
    """
    there = output.there
    if all(one.is_base for one in there):
        return [(one, 1.0) for one in there]
    weighted = [(one, counted_weight(one.model, one.parameters["weight"], one.is_base)) for one in there]
    found = [(one, weight) for one, weight in weighted if weight > 0]
    if not found:
        raise FisherMaskError(f"every model has weight 0 at {output.name}")
    return found


def forecast(output: Output, sidecars: Mapping[str, Sidecar | None]) -> Forecast:
    """Foretell a tensor's shares, by the merge's own arithmetic.

    Args:
        output: The tensor; at least one of its inputs is there.
        sidecars: By model.

    Raises:
        FisherMaskError: If the weights cannot be used, or the sidecars do not fit the models or each other.
    """
    parts = counted(output)
    models, weights = tuple(one.model for one, _ in parts), [weight for _, weight in parts]
    if len(parts) == 1:
        return Forecast(output, models, torch.ones(1, dtype=torch.float64), None)
    known = [sidecars.get(model) for model in models]
    found = [
        None if sidecar is None else _found(sidecar, one)
        for sidecar, (one, _) in zip(known, parts, strict=True)
    ]
    given = {field.name: output.parameters[field.name] for field in fields(Scheme)}
    scheme = Scheme(**given | {"prior": check_prior(given["prior"], given["normalize"])})
    fishers = fisher_rows(known, found, len(parts[0][0].shape or ()), scheme)
    weighed = scheme.of(found[0]) if fishers else None
    if scheme.prior and fishers:  # Of what is added to the parent.
        fishers = [scheme.prior + fisher for fisher in fishers]
    return Forecast(output, models, shares(weights, fishers), weighed, scheme.values)


def _found(sidecar: Sidecar, one: Input) -> Found:
    found = sidecar.governed.get(one.name)
    if found is not None and found[1].shape != one.shape:
        raise SidecarMismatchError(
            f"sidecar '{sidecar.source}' was measured on {sidecar.metadata.described_checkpoint}: there "
            f"{one.name} is {list(found[1].shape)}, in {one.model} it is {list(one.shape or ())}"
        )
    return found
