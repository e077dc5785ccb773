"""``mergekit-fisher compute``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fisher_mask_mergekit.cli.launched import joined_processes, spread_by_launcher
from fisher_mask_mergekit.cli.options import Device, TrustRemoteCode
from fisher_mask_mergekit.cli.output import errors, print_lines, progress, say, silence_progress_bars
from fisher_mask_mergekit.errors import RecipeError

if TYPE_CHECKING:
    from fisher_mask_mergekit.prepass import Outcome
    from fisher_mask_mergekit.recipe import RecipeModel
    from fisher_mask_mergekit.settings import FisherSettings


def compute(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|MODEL", help="A recipe (.yml), a checkpoint's folder or its hub id."),
    ],
    kind: Annotated[
        Literal["mask", "factored", "diagonal"] | None,
        typer.Option(
            help="Measure mask nodes, for fisher_mask; rows and columns of all parameters, for its nodes: all; or every "
            "parameter, for fisher_diagonal. [default: told by the recipe, else mask]"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set: path[:config[:split]][@revision], or a .jsonl, .csv or .parquet file."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to draw. [default: 128]")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw. [default: 0]")] = None,
    task: Annotated[
        Literal[
            "sequence-classification",
            "token-classification",
            "question-answering",
            "multiple-choice",
            "masked-lm",
            "causal-lm",
            "seq2seq-lm",
        ]
        | None,
        typer.Option(help="What the checkpoint predicts. [default: told by its class]"),
    ] = None,
    loss: Annotated[
        Literal["mean", "sum"] | None,
        typer.Option(help="Mean or sum over what is predicted of a sample. [default: mean]"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Column that the model reads, or several with commas between (or as JSON): text, question."
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column that it is to predict: label, tags, answer.")
    ] = None,
    label_map: Annotated[
        str | None, typer.Option(help="The data's labels to the checkpoint's: 'neg=0,pos=1', or as JSON.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per sample at most. [default: the checkpoint's limit, at most 512]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per batch at most. [default: any number; 32 with estimator batch]"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per batch at most, padding included. [default: 2048, on a GPU as many as fit]",
        ),
    ] = None,
    estimator: Annotated[
        Literal["sample", "batch"] | None,
        typer.Option(
            help="Squared per-sample gradients, or the released code's squared batch gradients. [default: sample]"
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Measure the K-th of N shares of the samples only, for mergekit-fisher combine. [default: all]",
        ),
    ] = None,
    mask_placement: Annotated[
        Literal["post", "pre"] | None,
        typer.Option(help="Neuron mask after or before the activation. [default: post]"),
    ] = None,
    labels: Annotated[
        Literal["data", "sampled", "exact"] | None,
        typer.Option(
            help="Labels of the data, drawn from the model, or the expectation over all. [default: data]"
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option(help="Dtype of the weights. [default: float32]"),
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", help="Run layers a second time instead of keeping their activations: less memory."
        ),
    ] = False,
    checkpoint_every: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="How often to save the sums so far, for the same command to go on from if it is interrupted; 0: never.",
        ),
    ] = 60,
    spread: Annotated[
        Literal["layers", "shards", "offload"] | None,
        typer.Option(
            help="Spread the weights: layers over the GPUs of one process; shards over all processes that were launched; "
            "offload, shards kept in main memory. [default: whole in every process]"
        ),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the sidecar (one model only). [default: beside a local checkpoint, else the cache]"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again even if the same was measured before.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the checkpoints of a recipe, or one checkpoint, and write their sidecars."""
    given: dict[str, Any] = {
        "kind": kind,
        "data": data,
        "samples": samples,
        "seed": seed,
        "task": task,
        "loss": loss,
        "label": label,
        "max_length": max_length,
        "batch_size": batch_size,
        "share": share,
        "estimator": estimator,
        "mask_placement": mask_placement,
        "labels": labels,
        "dtype": dtype,
    }
    spread = spread or spread_by_launcher()
    with errors(), joined_processes(device, in_parts=spread in ("shards", "offload")) as joined:
        if text is not None:
            given["text"] = _parse_text(text)
        if label_map is not None:
            given["label_map"] = _parse_label_map(label_map)
        overrides = {name: value for name, value in given.items() if value is not None}
        wanted = list(_requests(target, overrides, out, looks=joined is None or joined[0].is_first))
        from fisher_mask_mergekit import prepass
        from fisher_mask_mergekit.execution import check_options, pick_device
        from fisher_mask_mergekit.job import prepare
        from fisher_mask_mergekit.processes import ALONE

        silence_progress_bars()
        processes, where = joined or (ALONE, pick_device(device))
        first = processes.is_first
        if spread == "layers" and (processes.count > 1 or device is not None):
            raise RecipeError(
                "--spread layers is for one process, which takes all GPUs of its machine: start no others, and give no --device"
            )
        if spread == "layers" and where.type == "cpu":
            raise RecipeError("--spread layers takes GPUs, and there is none here")
        # All that can be wrong is found before the first is measured.
        for _, settings, _ in wanted:
            check_options(settings, batch_tokens, recompute=recompute, spread=spread)
        jobs = [
            prepare(
                name,
                settings,
                out=path,
                force=force or not first,
                trust_remote_code=trust_remote_code,
                writes=first,
            )
            for name, settings, path in wanted
        ]
        targets = [job.target.resolve() for job in jobs]
        if twice := {str(target) for target in targets if targets.count(target) > 1}:
            raise RecipeError(
                f"two models would be written to {min(twice)}; give each a place:  parameters: {{sidecar: PATH}}"
            )
        processes.agree(target, {"models": ", ".join(name for name, _, _ in wanted)})
        for (name, _, _), job in zip(wanted, jobs, strict=True):
            if not first:
                prepass.assist(
                    job, where, processes, batch_tokens=batch_tokens, recompute=recompute, spread=spread
                )
                continue
            with _kept_if_interrupted(name, job.target), progress(name) as (on_start, on_batch):
                outcome = prepass.compute(
                    job,
                    where,
                    batch_tokens=batch_tokens,
                    recompute=recompute,
                    spread=spread,
                    checkpoint_every=checkpoint_every,
                    on_note=partial(_say_of, name),
                    on_wait=partial(
                        say, f"{name}: waiting for another process that measures into {job.target}"
                    ),
                    on_start=on_start,
                    on_batch=on_batch,
                    processes=processes,
                )
            _report(name, outcome)


@contextmanager
def _kept_if_interrupted(name: str, target: Path) -> Iterator[None]:
    """Say of an interrupted measurement what there is to go on from."""
    from fisher_mask_mergekit.store import partial_path

    try:
        yield
    except KeyboardInterrupt:
        if (partial := partial_path(target)).is_file():
            say(f"{name}: what was summed is kept in {partial}; the same command goes on from there")
        raise


def _requests(
    target: str, overrides: dict[str, Any], out: Path | None, *, looks: bool
) -> Iterator[tuple[str, "FisherSettings", Path | None]]:
    """What to measure: model, settings, and where to write if not to the usual place.

    Args:
        target: A recipe or a checkpoint.
        overrides: What beats the recipe's settings.
        out: Where to write, if that was given.
        looks: Whether to see to it that models that are not measured have a sidecar.
    """
    from pydantic import ValidationError

    from fisher_mask_mergekit import hub
    from fisher_mask_mergekit.recipe import describe, read_recipe
    from fisher_mask_mergekit.settings import FisherSettings
    from fisher_mask_mergekit.store import expanded, of_share

    if Path(target).suffix not in (".yml", ".yaml") and not Path(target).is_file():
        if "data" not in overrides:
            raise RecipeError(
                f"say what to measure {target} on:  mergekit-fisher compute {target} --data DATASET"
            )
        try:
            yield target, FisherSettings.model_validate(overrides), out
        except ValidationError as error:
            raise RecipeError(describe(error)) from error
        return
    recipe = read_recipe(Path(target), overrides)
    if recipe.kind is None:
        say(f"{target}: merge_method is {recipe.method}, which uses no sidecars; measuring all the same")
    # What a recipe's sidecar names is of the kind that its method reads.
    paths = {
        m.name: m.sidecar
        for m in recipe.models
        if m.settings is not None and m.sidecar and m.kind == (recipe.kind or m.kind)
    }
    published = {name for name, path in paths.items() if path.startswith(hub.PREFIX)}
    measurable = [m for m in recipe.models if m.settings is not None and m.name not in published]
    for model in recipe.models if looks else ():
        if model not in measurable and not (model.is_base and model.weight is None):
            _check_has_sidecar(model, target)
    if out is not None and len(measurable) > 1:
        raise RecipeError("--out takes one model; for a recipe, give each model  parameters: {sidecar: PATH}")
    if len(set(paths.values())) < len(paths):
        double = max(paths.values(), key=list(paths.values()).count)
        raise RecipeError(
            f"{target}: two models have the same sidecar: {double}; give each one of its own:  "
            "parameters: {sidecar: PATH}"
        )
    for model in measurable:
        assert model.settings is not None
        path = paths.get(model.name)
        share = model.settings.share
        yield model.name, model.settings, out or (of_share(expanded(path), share) if path else None)


def _check_has_sidecar(model: "RecipeModel", recipe: str) -> None:
    """A model without data, or with a sidecar on the hub, must have been measured by somebody else."""
    from fisher_mask_mergekit import store
    from fisher_mask_mergekit.checkpoint import locate

    found = store.sidecar_of(model.sidecar, None if model.sidecar else locate(model.name), model.kind)
    if found is None:
        raise RecipeError(
            f"{recipe}: {model.name} has no sidecar and no data to measure it on; "
            "add  fisher: {data: DATASET}  beside it"
        )
    why = "no data in the recipe" if model.settings is None else f"the recipe names {model.sidecar}"
    say(f"{model.name}: {why}; its sidecar is {found}")


def _parse_text(text: str) -> Any:
    if text.startswith("["):
        return _parse_json(text, "--text")
    return tuple(text.split(",")) if "," in text else text


def _parse_label_map(text: str) -> Any:
    if text.startswith("{"):
        return _parse_json(text, "--label-map")
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and sign and value.strip() for key, sign, value in pairs):
        raise RecipeError(f"--label-map: expected DATA=CHECKPOINT pairs with commas between, got '{text}'")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _parse_json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{option}: not JSON: {error}, got '{text}'") from error


def _say_of(name: str, note: str) -> None:
    say(f"{name}: {note}")


def _report(name: str, outcome: "Outcome") -> None:
    for note in outcome.notes:
        say(note)
    metadata = outcome.sidecar.metadata
    how = "measured before" if outcome.served else f"{outcome.seconds:.1f} s on {metadata.device}"
    accuracy = "" if metadata.accuracy is None else f"accuracy {metadata.accuracy:.3f}, "
    print_lines(
        [f"{name}: {metadata.samples} samples, {accuracy}loss {metadata.loss:.4f}, {how}, {outcome.path}"]
    )
