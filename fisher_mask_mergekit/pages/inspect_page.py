"""The page of ``mergekit-fisher inspect``: a panel per model, and of a recipe each model's share of the merge."""

from collections.abc import Mapping, Sequence

from fisher_mask_mergekit.pages.fisher_numbers import layer_names
from fisher_mask_mergekit.pages.html import (
    Html,
    Section,
    element,
    figure,
    joined,
    number,
    page,
    sentence,
    table,
)
from fisher_mask_mergekit.pages.model_panel import Panel, model_sections
from fisher_mask_mergekit.pages.share_pictures import legend, share_picture
from fisher_mask_mergekit.pages.text import clean, headings
from fisher_mask_mergekit.preview.inspection import ShareStatistics
from fisher_mask_mergekit.preview.printout import others_title, share_groups
from fisher_mask_mergekit.sidecar import Sidecar

_LEAD = (
    "Which attention heads and which FFN neurons matter to each model's own task: the Fisher information of a mask on "
    "each, measured on samples of that task. Below every picture are its numbers."
)

_CAPTION = Html("Each model's share of the merge: the mean over a layer's rows or columns.")


def sidecars_page(sidecars: Sequence[Sidecar]) -> str:
    """A page about sidecars.

    Args:
        sidecars: One panel for each.
    """
    names = headings([sidecar.metadata.checkpoint for sidecar in sidecars])
    panels = [Panel(name, sidecar) for name, sidecar in zip(names, sidecars, strict=True)]
    title = (
        f"Fisher information of {names[0]}"
        if len(names) == 1
        else f"Fisher information of {len(names)} models"
    )
    return page(title, Html(_LEAD), model_sections(panels))


def recipe_page(
    recipe: str, sidecars: Mapping[str, Sidecar | None], shares: Sequence[ShareStatistics]
) -> str:
    """A page about a recipe.

    Args:
        recipe: Its file's name.
        sidecars: By model, as the recipe names it; None for one that is merged without.
        shares: What :func:`~fisher_mask_mergekit.preview.inspection.recipe_shares` found.
    """
    names = dict(zip(sidecars, headings(list(sidecars)), strict=True))
    lacks = "it has no sidecar; tensors that it takes part in are weighed by weight alone."
    panels = [
        Panel(names[model], sidecar, lacks)
        for model, sidecar in sidecars.items()
        if sidecar is not None or any(model in one.shares for one in shares)
    ]
    models = {model: name for model, name in names.items() if any(model in one.shares for one in shares)}
    lead = sentence(f"{_LEAD} And what the merge makes of it, by ", recipe, ".")
    return page(f"What {clean(recipe, 80)} merges", lead, [_shares(shares, models), *model_sections(panels)])


def _shares(shares: Sequence[ShareStatistics], models: Mapping[str, str]) -> Section:
    """Each model's share of every layer, and of what weight alone decides on."""
    parts = []
    for place, (title, rows) in enumerate(share_groups(shares), 1):
        label = f"Each model's mean share of {clean(title, 200)}, {len(rows)} layers. " + "; ".join(
            f"{name} from {min(found):.0%} to {max(found):.0%}"
            for model, name in models.items()
            if (found := [row.shares[model][0] for row in rows if model in row.shares])
        )
        picture = share_picture(rows, list(models), f"shares-{place}", label)
        what = clean(title, 120)
        parts.append(
            figure(
                what[:1].upper() + what[1:],
                picture,
                _CAPTION,
                _share_table(title, rows, models),
                f"shares of {what}",
            )
        )
    others = [one for one in shares if not one.output]
    body = [element("div", joined(parts), class_="pictures")] if parts else []
    if others:
        rows_of_others = [
            [others_title(one), *(number(one.shares.get(model, (0.0,))[0], ".3f") for model in models)]
            for one in others
        ]
        body.append(
            table(
                "Each model's share of what weight alone decides on",
                ["tensors", *models.values()],
                rows_of_others,
            )
        )
    return Section(
        "shares", "Each model's share of every layer", joined([legend(list(models.values())), *body])
    )


def _share_table(title: str, rows: Sequence[ShareStatistics], models: Mapping[str, str]) -> Html:
    head = [
        "layer",
        *(f"{name}: {what}" for name in models.values() for what in ("mean", "smallest", "largest")),
    ]
    layers = layer_names([row.tensors[0] for row in rows])
    cells = [
        [
            layer,
            *(number(value, ".3f") for model in models for value in row.shares.get(model, (0.0, 0.0, 0.0))),
        ]
        for layer, row in zip(layers, rows, strict=True)
    ]
    return table(
        f"Each model's share of the {clean(title, 200)}, over a layer's rows or columns", head, cells
    )
