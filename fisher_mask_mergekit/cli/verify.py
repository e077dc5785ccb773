"""``mergekit-fisher verify``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisher_mask_mergekit.cli.options import Device, TrustRemoteCode
from fisher_mask_mergekit.cli.output import errors, print_json, print_lines, progress, silence_progress_bars
from fisher_mask_mergekit.errors import HubError, RecipeError, SidecarError, SidecarNotFoundError

if TYPE_CHECKING:
    from fisher_mask_mergekit.verify import Check


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SIDECAR",
            help="A sidecar, of any kind, here or on the hub (hub:org/repo/path@revision), or the folder of a "
            "checkpoint that has one.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to compare it with: a folder or a hub id. [default: the one whose folder it lies in]"
        ),
    ] = None,
    recompute: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="Measure so many of its samples again, and compare; all of them to be sure.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="With --recompute, where the data is. [default: what the sidecar says, at its commit]"
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --recompute, tokens per batch at most, padding included. [default: 2048, on a GPU as many as fit]",
        ),
    ] = None,
    recompute_layers: Annotated[
        bool,
        typer.Option(
            "--recompute-layers",
            help="With --recompute, run layers a second time instead of keeping their activations: less memory.",
        ),
    ] = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check a sidecar: whole, of this checkpoint, and, measured again, with these numbers."""
    with errors():
        from dataclasses import asdict

        given = {"--data": data, "--batch-tokens": batch_tokens, "--recompute-layers": recompute_layers}
        if recompute is None and (idle := [name for name, value in given.items() if value]):
            raise RecipeError(f"{idle[0]} says how to measure again; it goes with --recompute")
        how = {
            "data": data,
            "batch_tokens": batch_tokens,
            "recompute_layers": recompute_layers,
            "trust_remote_code": trust_remote_code,
        }
        silence_progress_bars()
        checks = []
        for check in _checks(target, model, recompute, device, how):
            checks.append(check)
            if not as_json:
                print_lines([f"{check.verdict}: {check.what}: {check.detail}"])
        passed = all(check.verdict != "failed" for check in checks)
        if as_json:
            print_json({"sidecar": target, "ok": passed, "checks": [asdict(check) for check in checks]})
        if not passed:
            raise typer.Exit(1)


def _checks(
    target: str, model: str | None, count: int | None, device: str | None, how: dict[str, Any]
) -> Iterator["Check"]:
    from fisher_mask_mergekit import verify
    from fisher_mask_mergekit.execution import pick_device
    from fisher_mask_mergekit.remeasure import remeasure

    try:
        sidecar, folder = verify.find(target)
        whole = verify.check_file(sidecar)
    except (HubError, SidecarNotFoundError):
        raise  # There is none to look at.
    except SidecarError as error:
        yield verify.Check("file", "failed", str(error))
        return
    name = model or folder
    if count is not None and name is None:
        raise RecipeError(f"--recompute needs the checkpoint: {verify.no_checkpoint(sidecar).detail}")
    yield whole
    if name is None:
        yield verify.no_checkpoint(sidecar)
        return
    weights = verify.check_weights(sidecar, name)
    yield from weights
    if count is None:
        return
    if any(check.verdict == "failed" for check in weights):
        yield verify.Check("numbers", "not checked", "this checkpoint's would be others")
        return
    with progress(name) as (on_start, on_batch):
        yield from remeasure(
            sidecar, name, count, pick_device(device), **how, on_start=on_start, on_batch=on_batch
        )
