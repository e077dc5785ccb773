"""What a sidecar holds, and what a merge will do with several: the numbers of `mergekit-fisher inspect`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit import store
from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, SidecarError, SidecarNotFoundError
from fisher_mask_mergekit.opening import AnySidecar
from fisher_mask_mergekit.preview.forecast import Forecast, forecast
from fisher_mask_mergekit.preview.peek import Peeked, peek
from fisher_mask_mergekit.preview.plan import Output, plan_merge
from fisher_mask_mergekit.provenance import reproducing_command
from fisher_mask_mergekit.recipe import DIAGONAL_METHOD, METHOD, Recipe, RecipeModel
from fisher_mask_mergekit.sidecar import Sidecar, read, whole
from fisher_mask_mergekit.sites import layer_of, name_template

_LONG = {"sites", "tensors", "views", "others"}
"""Fields of the metadata that have an entry for every tensor."""


@dataclass(frozen=True)
class NodeStatistics:
    """The Fisher information of a site's heads, key-value heads or neurons.

    Attributes:
        output: The site's output projection.
        nodes: ``heads``, ``key-value heads`` or ``neurons``.
        count: How many there are.
        mean: In nats squared.
        variation: Standard deviation over mean; None if the mean is zero.
        zeros: Share of those that are exactly zero.
        experts: How many experts the site has.
        unreached: How many of them no sample reached: all of their neurons are zero.
    """

    output: str
    nodes: str
    count: int
    mean: float
    variation: float | None
    zeros: float
    experts: int
    unreached: int


@dataclass(frozen=True)
class ShareStatistics:
    """What each model contributes to tensors that are merged alike.

    Attributes:
        tensors: Their names in the output.
        output: The site's output projection; empty where weight alone decides.
        layout: What of the tensors' rows or columns the numbers are about, as in a sidecar; empty likewise.
        shares: Per model that counts, the mean, the smallest and the largest share of a row or a column.
        values: Whether value rows are among them.
    """

    tensors: tuple[str, ...]
    output: str
    layout: str
    shares: Mapping[str, tuple[float, float, float]]
    values: bool = False


def node_statistics(sidecar: Sidecar) -> list[NodeStatistics]:
    """Statistics of all of a sidecar's nodes, site by site; key-value heads where they are not the heads."""
    found = []
    for site in sidecar.metadata.sites:
        vectors = sidecar.fisher[site.output]
        if site.kind == "ffn":
            found.append(_statistics(site.output, "neurons", vectors["neuron_fisher"], site.experts))
            continue
        found.append(_statistics(site.output, "heads", vectors["head_fisher"]))
        if site.kv_heads != site.heads:
            found.append(_statistics(site.output, "key-value heads", vectors["kv_head_fisher"]))
    return found


def _statistics(output: str, nodes: str, fisher: Tensor, experts: int = 0) -> NodeStatistics:
    values = fisher.double()
    mean = float(values.mean())
    return NodeStatistics(
        output=output,
        nodes=nodes,
        count=values.numel(),
        mean=mean,
        variation=float(values.std(correction=0)) / mean if mean > 0 else None,
        zeros=float((values == 0).double().mean()),
        experts=experts,
        unreached=int((values == 0).all(-1).sum()) if experts else 0,
    )


def with_mask_nodes(sidecars: Iterable[AnySidecar]) -> list[Sidecar]:
    """The sidecars, if all are of mask nodes.

    Raises:
        SidecarError: If one is of parameters: there are no heads and neurons in it to draw.
    """
    found = []
    for sidecar in sidecars:
        if not isinstance(sidecar, Sidecar):
            raise SidecarError(
                f"{sidecar.source} is of kind {sidecar.metadata.settings.kind}: it has no mask nodes to draw; leave out "
                "--html and --png"
            )
        found.append(sidecar)
    return found


def sidecar_of(model: RecipeModel, peeked: Peeked) -> Sidecar | None:
    """The sidecar that a merge will use for a model of a recipe; None if there is none.

    Raises:
        SidecarError: If there is one that cannot be used.
    """
    path = store.sidecar_of(model.sidecar, peeked.checkpoint)
    return whole(read(path)) if path else None


def sidecar_or_reason(model: RecipeModel) -> tuple[Sidecar | None, str]:
    """The sidecar of a model of a recipe for whatever method, else why there is none to be read."""
    try:
        # A recipe for the diagonal names a sidecar of the other kind.
        named = model.sidecar if model.kind == "mask" else None
        path = store.sidecar_of(named, peek(model.name).checkpoint)
        return (whole(read(path)), "") if path else (None, f"{model.name} has no sidecar.")
    except FisherMaskError as error:
        return None, str(error)


def recipe_shares(
    recipe: Recipe,
) -> tuple[dict[str, Sidecar | None], list[ShareStatistics]]:
    """What a merge will do: the sidecars that it will use, and each model's share of every tensor.

    Raises:
        FisherMaskError: If the merge would fail for a reason that can be known without the weights.
    """
    if recipe.method != METHOD:
        uses = "has no mask nodes to show" if recipe.method == DIAGONAL_METHOD else "uses no sidecars"
        raise RecipeError(f"{recipe.path}: merge_method is {recipe.method}, which {uses}")
    if recipe.kind == "factored":
        raise RecipeError(f"{recipe.path}: nodes: all has no mask nodes to show")
    models = {model.name: peek(model.name) for model in recipe.models}
    for name, peeked in models.items():
        if peeked.shapes is None:
            raise RecipeError(
                f"the tensors of {name} cannot be told without a download: it has no safetensors, or the hub "
                "cannot be reached; give its sidecar instead of the recipe"
            )
    sidecars = {model.name: sidecar_of(model, models[model.name]) for model in recipe.models}
    outputs = [output for output in plan_merge(recipe, models) if output.there]
    _require(recipe, outputs, sidecars)
    return sidecars, _grouped(forecast(output, sidecars) for output in outputs)


def _require(recipe: Recipe, outputs: Sequence[Output], sidecars: Mapping[str, Sidecar | None]) -> None:
    """Whoever counts needs a sidecar, as in the merge."""
    for output in outputs:
        parts = forecast(output, {}).models
        missing = [model for model in parts if sidecars[model] is None]
        if len(parts) > 1 and missing and output.parameters["missing"] == "error":
            raise SidecarNotFoundError(
                f"there is no sidecar for {missing[0]}. Measure it:  mergekit-fisher compute {recipe.path}"
            )


def _grouped(forecasts: Iterable[Forecast]) -> list[ShareStatistics]:
    """Tensors of one layer with one layout and one site's shares together; so those that weight alone decides."""
    groups: dict[Any, list[Forecast]] = {}
    for one in forecasts:
        if one.found is None:
            key: Any = (one.models, tuple(one.shares.flatten().tolist()))
        else:
            site, tensor = one.found
            key = (
                one.models,
                name_template(site.output),
                layer_of(one.output.name),
                tensor.layout,
                one.values,
            )
        groups.setdefault(key, []).append(one)
    return sorted((_share_statistics(group) for group in groups.values()), key=_reading_order)


def _share_statistics(group: Sequence[Forecast]) -> ShareStatistics:
    first = group[0]
    rows = torch.cat([one.rows() for one in group], 1)
    values = zip(rows.mean(1).tolist(), rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
    site, tensor = first.found or (None, None)
    return ShareStatistics(
        tensors=tuple(sorted(one.output.name for one in group)),
        output=site.output if site else "",
        layout=tensor.layout if tensor else "",
        shares=dict(zip(first.models, values, strict=True)),
        values=first.values,
    )


def _reading_order(one: ShareStatistics) -> tuple[bool, str, str, bool, int, tuple[str, ...]]:
    """Site by site, layer by layer; what weight alone decides last."""
    layer = layer_of(one.tensors[0])
    return not one.output, name_template(one.output), one.layout, one.values, int(layer or 0), one.tensors


def as_json(sidecars: Iterable[AnySidecar], shares: Iterable[ShareStatistics]) -> dict[str, Any]:
    """Everything that `inspect` knows, as `docs/cli.md` describes it."""
    return {
        "sidecars": [
            {
                "path": sidecar.source,
                "metadata": sidecar.metadata.model_dump(mode="json", exclude=_LONG),
                "command": reproducing_command(sidecar.metadata),
                "nodes": [asdict(one) for one in node_statistics(sidecar)]
                if isinstance(sidecar, Sidecar)
                else [],
            }
            for sidecar in sidecars
        ],
        "shares": [
            {
                "tensors": list(one.tensors),
                "output": one.output or None,
                "layout": one.layout or None,
                "models": {
                    model: dict(zip(("mean", "min", "max"), values, strict=True))
                    for model, values in one.shares.items()
                },
            }
            for one in shares
        ],
    }
