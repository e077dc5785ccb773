"""Before a merge: ``mergekit-fisher init``, ``sites``, ``inspect``, ``check``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisher_mask_mergekit.cli.output import errors, print_json, print_lines, silence_loading
from fisher_mask_mergekit.errors import RecipeError

if TYPE_CHECKING:
    from fisher_mask_mergekit.opening import AnySidecar
    from fisher_mask_mergekit.sidecar import Sidecar


def init(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints: folders or hub ids.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="What to measure a checkpoint on; repeat it, in the checkpoints' order."),
    ] = None,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="What all of them were fine-tuned from: add up what they changed of it."
        ),
    ] = None,
) -> None:
    """Print a recipe that merges the given checkpoints, also where their heads differ."""
    with errors():
        from fisher_mask_mergekit.draft import draft_recipe

        print(draft_recipe(models, data or (), parent), end="")


def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder or its hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show where a checkpoint's mask nodes sit, what they govern, and what a merge averages."""
    with errors():
        from fisher_mask_mergekit.preview.survey import survey

        silence_loading()
        found = survey(model)
        if as_json:
            print_json(
                {
                    "checkpoint": found.checkpoint,
                    "architecture": found.architecture,
                    "is_checked": found.is_checked,
                    "sites": [site.model_dump(mode="json") for site in found.sites],
                    "averaged": dict(found.averaged),
                }
            )
            return
        from fisher_mask_mergekit.preview.printout import survey_lines

        print_lines(survey_lines(found))


def inspect(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="SIDECAR...|RECIPE",
            help="Sidecars (files, or hub:ORG/NAME/PATH[@revision]), or folders of checkpoints that have one; or a "
            "recipe (.yml).",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write it there as a page with pictures too."),
    ] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the heat map there too.")
    ] = None,
) -> None:
    """Show what sidecars hold; of a recipe, also each model's share of what the merge weighs."""
    with errors():
        from fisher_mask_mergekit.opening import open_sidecar
        from fisher_mask_mergekit.preview import inspection
        from fisher_mask_mergekit.recipe import read_recipe
        from fisher_mask_mergekit.store import check_writable, write_result

        check_writable(html_file, png_file)
        shares: list[inspection.ShareStatistics] = []
        models: list[str] = []
        found: dict[str, Sidecar | None] = {}
        sidecars: list[AnySidecar]
        if any(Path(target).suffix in (".yml", ".yaml") for target in targets):
            if len(targets) > 1:
                raise RecipeError("inspect takes one recipe, or any number of sidecars")
            silence_loading()
            found, shares = inspection.recipe_shares(read_recipe(Path(targets[0])))
            models = [name for name in found if any(name in one.shares for one in shares)]
            sidecars = [sidecar for sidecar in found.values() if sidecar is not None]
        else:
            sidecars = [open_sidecar(target) for target in targets]
        if html_file is not None or png_file is not None:
            drawn = inspection.with_mask_nodes(sidecars)
        if html_file is not None:
            from fisher_mask_mergekit.pages.inspect_page import recipe_page, sidecars_page

            is_recipe = bool(found)
            page = recipe_page(Path(targets[0]).name, found, shares) if is_recipe else sidecars_page(drawn)
        if png_file is not None:
            from fisher_mask_mergekit.pages.fisher_pictures import head_fisher_map
            from fisher_mask_mergekit.pages.text import headings

            names = headings([sidecar.metadata.checkpoint for sidecar in drawn])
            head_fisher_map(dict(zip(names, drawn, strict=True)), png_file)
        if html_file is not None:  # Last: without a sidecar there is a page, but no heat map.
            write_result(html_file, page.encode())
        if as_json:
            print_json(inspection.as_json(sidecars, shares))
            return
        from fisher_mask_mergekit.preview.printout import share_lines, sidecar_lines

        for sidecar in sidecars:
            print_lines((*sidecar_lines(sidecar), ""))
        if models:
            print_lines(share_lines(shares, models))


def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yml).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what is wrong with a recipe before its merge; downloads no weights."""
    with errors():
        from dataclasses import asdict

        from fisher_mask_mergekit.preview.check import check_recipe

        silence_loading()
        findings = check_recipe(recipe)
        failed = any(finding.level == "error" for finding in findings)
        if as_json:
            print_json({"recipe": str(recipe), "ok": not failed, "findings": [asdict(f) for f in findings]})
        else:
            for finding in findings:
                print_lines((f"{finding.level}: {finding.what}: {finding.detail}", f"  {finding.remedy}"))
            if not findings:
                print("ok")
        if failed:
            raise typer.Exit(1)
