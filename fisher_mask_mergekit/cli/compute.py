"""``mergekit-fisher compute``."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fisher_mask_mergekit.cli.launched import joined_processes, spread_by_launcher
from fisher_mask_mergekit.cli.options import Device, TrustRemoteCode
from fisher_mask_mergekit.cli.output import errors, print_lines, progress, say, silence_progress_bars
from fisher_mask_mergekit.cli.requests import parse_label_map, parse_text, requests
from fisher_mask_mergekit.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from fisher_mask_mergekit.cli.requests import Request
    from fisher_mask_mergekit.execution import Execution
    from fisher_mask_mergekit.job import Job
    from fisher_mask_mergekit.processes import Processes


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
        typer.Option(
            help="Data set: path[:config[:split]][@revision], or a .jsonl, .csv or .parquet file; or random, for tokens drawn "
            "at random, with labels sampled."
        ),
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
        Literal["sample", "batch", "token"] | None,
        typer.Option(
            help="Squared per-sample gradients; the released code's squared batch gradients; or, of kind factored, per-token "
            "ones, which take less time. [default: sample]"
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
            given["text"] = parse_text(text)
        if label_map is not None:
            given["label_map"] = parse_label_map(label_map)
        overrides = {name: value for name, value in given.items() if value is not None}
        wanted = list(requests(target, overrides, out, looks=joined is None or joined[0].is_first))
        from fisher_mask_mergekit.execution import Execution, pick_device
        from fisher_mask_mergekit.processes import ALONE

        silence_progress_bars()
        processes, where = joined or (ALONE, pick_device(device))
        if spread == "layers" and (processes.count > 1 or device is not None):
            raise RecipeError(
                "--spread layers is for one process, which takes all GPUs of its machine: start no others, and give no --device"
            )
        if spread == "layers" and where.type == "cpu":
            raise RecipeError("--spread layers takes GPUs, and there is none here")
        execution = Execution(batch_tokens, recompute, spread)
        jobs = _looked_into(
            wanted,
            execution,
            force=force or not processes.is_first,
            trust_remote_code=trust_remote_code,
            writes=processes.is_first,
        )
        models = ", ".join(name for name, _, _ in wanted)
        processes.agree(target, {"models": models, "--force": str(force)})
        for (name, _, _), job in zip(wanted, jobs, strict=True):
            if processes.is_first:
                _measure(name, job, where, execution, processes, checkpoint_every)
            else:
                _assist(name, job, where, execution, processes, checkpoint_every, force=force)


def _looked_into(wanted: Sequence["Request"], execution: "Execution", **how: Any) -> list["Job"]:
    """All that can be wrong is found before the first is measured."""
    from fisher_mask_mergekit.execution import check_options
    from fisher_mask_mergekit.job import prepare

    for _, settings, _ in wanted:
        check_options(settings, execution)
    jobs = [prepare(name, settings, out=path, **how) for name, settings, path in wanted]
    targets = [job.target.resolve() for job in jobs]
    if twice := {str(target) for target in targets if targets.count(target) > 1}:
        raise RecipeError(
            f"two models would be written to {min(twice)}; give each a place:  parameters: {{sidecar: PATH}}"
        )
    return jobs


def _measure(
    name: str,
    job: "Job",
    where: "torch.device",
    execution: "Execution",
    processes: "Processes",
    checkpoint_every: float,
) -> None:
    """Measure a checkpoint, as the only process or the first one."""
    from fisher_mask_mergekit.prepass import compute
    from fisher_mask_mergekit.store import partial_path

    kept = partial_path(job.target, count=processes.count)
    with _kept_if_interrupted(name, kept), progress(name) as (on_start, on_batch):
        outcome = compute(
            job,
            where,
            execution,
            checkpoint_every=checkpoint_every,
            on_note=lambda note: say(f"{name}: {note}"),
            on_wait=lambda: say(f"{name}: waiting for another process that measures into {job.target}"),
            on_start=on_start,
            on_batch=on_batch,
            processes=processes,
        )
    for note in outcome.notes:
        say(note)
    metadata = outcome.sidecar.metadata
    how = "measured before" if outcome.served else f"{outcome.seconds:.1f} s on {metadata.device}"
    accuracy = "" if metadata.accuracy is None else f"accuracy {metadata.accuracy:.3f}, "
    print_lines(
        [f"{name}: {metadata.samples} samples, {accuracy}loss {metadata.loss:.4f}, {how}, {outcome.path}"]
    )


def _assist(
    name: str,
    job: "Job",
    where: "torch.device",
    execution: "Execution",
    processes: "Processes",
    checkpoint_every: float,
    *,
    force: bool,
) -> None:
    """Measure a share of it, as another process; it is silent, but for what befalls its own sums."""
    from fisher_mask_mergekit.prepass import assist

    about = f"{name}: process {processes.rank} of {processes.count}"
    assist(
        job,
        where,
        execution,
        processes,
        anew=force,
        checkpoint_every=checkpoint_every,
        on_note=lambda note: say(f"{about}: {note}", sys.__stderr__),
    )


@contextmanager
def _kept_if_interrupted(name: str, place: Path) -> Iterator[None]:
    """Say of an interrupted measurement what there is to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        if place.is_file():
            say(f"{name}: what was summed is kept in {place}; the same command goes on from there")
        raise
