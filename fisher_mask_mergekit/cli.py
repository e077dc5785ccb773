"""The command ``mergekit-fisher``: the only place that prints and exits."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fisher_mask_mergekit import __version__
from fisher_mask_mergekit.errors import FisherMaskError, RecipeError

if TYPE_CHECKING:
    from fisher_mask_mergekit.prepass import Outcome
    from fisher_mask_mergekit.recipe import RecipeModel
    from fisher_mask_mergekit.settings import FisherSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Measure the Fisher information of mask nodes, for mergekit's merge method fisher_mask.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def compute(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|MODEL", help="A recipe (.yml), a checkpoint's folder or its hub id."),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Data set: path[:config[:split]][@revision], or a .jsonl, .csv or .parquet file."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples to draw. [default: 128]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw. [default: 0]")] = None,
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
        typer.Option(help="Column that the model reads, or several with commas between: text, question."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column that it is to predict: label, tags, answer.")
    ] = None,
    label_map: Annotated[
        str | None, typer.Option(help="The data's labels to the checkpoint's: 'neg=0,pos=1'.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per sample at most. [default: the checkpoint's limit, at most 512]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per batch. [default: 32]")] = None,
    estimator: Annotated[
        Literal["sample", "batch"] | None,
        typer.Option(
            help="Squared per-sample gradients, or the released code's squared batch gradients. [default: sample]"
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
        Literal["float32", "bfloat16", "float64"] | None,
        typer.Option(help="Dtype of the weights. [default: float32]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to run. [default: cuda, else xpu, mps, cpu]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the sidecar (one model only). [default: beside a local checkpoint, else the cache]"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again even if the same was measured before.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint. No recipe can."),
    ] = False,
) -> None:
    """Measure the checkpoints of a recipe, or one checkpoint, and write their sidecars."""
    given: dict[str, Any] = {
        "data": data,
        "samples": samples,
        "seed": seed,
        "task": task,
        "loss": loss,
        "text": text and (tuple(text.split(",")) if "," in text else text),
        "label": label,
        "max_length": max_length,
        "batch_size": batch_size,
        "estimator": estimator,
        "mask_placement": mask_placement,
        "labels": labels,
        "dtype": dtype,
    }
    with _errors():
        if label_map is not None:
            given["label_map"] = _parse_label_map(label_map)
        overrides = {name: value for name, value in given.items() if value is not None}
        wanted = list(_requests(target, overrides, out))
        from fisher_mask_mergekit import prepass
        from fisher_mask_mergekit.job import prepare

        _silence_progress_bars()
        where = prepass.pick_device(device)
        # All that can be wrong is found before the first is measured.
        jobs = [
            prepare(name, settings, out=path, force=force, trust_remote_code=trust_remote_code)
            for name, settings, path in wanted
        ]
        for (name, _, _), job in zip(wanted, jobs, strict=True):
            with _progress(name) as (on_start, on_batch):
                outcome = prepass.compute(job, where, on_start=on_start, on_batch=on_batch)
            _report(name, outcome)


@app.command()
def init(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints: folders or hub ids.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="What to measure a checkpoint on; repeat it, in the checkpoints' order."),
    ] = None,
) -> None:
    """Print a recipe that merges the given checkpoints, also where their heads differ."""
    with _errors():
        from fisher_mask_mergekit.draft import draft_recipe

        print(draft_recipe(models, data or ()), end="")


@app.command()
def heads(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What was merged.")],
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="The merged folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Gets a folder per model of the recipe.")],
    pooler: Annotated[
        Literal["own", "average"], typer.Option(help="Each task's own pooler, or the mean of all.")
    ] = "own",
) -> None:
    """Write a complete checkpoint per task: the merged encoder with the task's own head."""
    with _errors():
        from fisher_mask_mergekit.heads import write_heads
        from fisher_mask_mergekit.recipe import read_recipe

        for folder in write_heads(read_recipe(recipe), merged, out, pooler):
            print(folder)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to work; must not exist.")] = Path("demo"),
) -> None:
    """Train, measure, merge and compare, on bundled text; a few minutes on two cores, no network."""
    with _errors():
        from fisher_mask_mergekit.demo import run_demo

        run_demo(out, say=print)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder or its hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show where a checkpoint's mask nodes sit, what they govern, and what a merge averages."""
    with _errors():
        from fisher_mask_mergekit.survey import survey

        _silence_loading()
        found = survey(model)
        if as_json:
            _print_json(
                {
                    "checkpoint": found.checkpoint,
                    "architecture": found.architecture,
                    "is_checked": found.is_checked,
                    "sites": [site.model_dump(mode="json") for site in found.sites],
                    "averaged": dict(found.averaged),
                }
            )
            return
        from fisher_mask_mergekit.printout import survey_lines

        _print_lines(survey_lines(found))


@app.command()
def inspect(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="SIDECAR...|RECIPE",
            help="Sidecars, or folders of checkpoints that have one; or a recipe (.yml).",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what sidecars hold; of a recipe, also each model's share of what the merge weighs."""
    with _errors():
        from fisher_mask_mergekit import inspection
        from fisher_mask_mergekit.recipe import read_recipe

        shares: list[inspection.ShareStatistics] = []
        models: list[str] = []
        if any(Path(target).suffix in (".yml", ".yaml") for target in targets):
            if len(targets) > 1:
                raise RecipeError("inspect takes one recipe, or any number of sidecars")
            _silence_loading()
            found, shares = inspection.recipe_shares(read_recipe(Path(targets[0])))
            models = [name for name in found if any(name in one.shares for one in shares)]
            sidecars = [sidecar for sidecar in found.values() if sidecar is not None]
        else:
            sidecars = [inspection.open_sidecar(Path(target)) for target in targets]
        if as_json:
            _print_json(inspection.as_json(sidecars, shares))
            return
        from fisher_mask_mergekit.printout import share_lines, sidecar_lines

        for sidecar in sidecars:
            _print_lines((*sidecar_lines(sidecar), ""))
        if models:
            _print_lines(share_lines(shares, models))


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yml).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what is wrong with a recipe before its merge; downloads no weights."""
    with _errors():
        from dataclasses import asdict

        from fisher_mask_mergekit.check import check_recipe

        _silence_loading()
        findings = check_recipe(recipe)
        failed = any(finding.level == "error" for finding in findings)
        if as_json:
            _print_json({"recipe": str(recipe), "ok": not failed, "findings": [asdict(f) for f in findings]})
        else:
            for finding in findings:
                print(f"{finding.level}: {finding.what}: {finding.detail}\n  {finding.remedy}")
            if not findings:
                print("ok")
        if failed:
            raise typer.Exit(1)


def _requests(
    target: str, overrides: dict[str, Any], out: Path | None
) -> Iterator[tuple[str, "FisherSettings", Path | None]]:
    """What to measure: model, settings, and where to write if not to the usual place."""
    from pydantic import ValidationError

    from fisher_mask_mergekit.recipe import METHOD, describe, read_recipe
    from fisher_mask_mergekit.settings import FisherSettings

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
    if recipe.method != METHOD:
        _say(f"{target}: merge_method is {recipe.method}, which uses no sidecars; measuring all the same")
    measurable = [model for model in recipe.models if model.settings is not None]
    for model in recipe.models:
        if model.settings is None and not (model.is_base and model.weight is None):
            _check_has_sidecar(model, target)
    if out is not None and len(measurable) > 1:
        raise RecipeError("--out takes one model; for a recipe, give each model  parameters: {sidecar: PATH}")
    paths = [model.sidecar for model in measurable if model.sidecar]
    if len(set(paths)) < len(paths):
        raise RecipeError(f"{target}: two models have the same sidecar: {max(paths, key=paths.count)}")
    for model in measurable:
        assert model.settings is not None
        yield model.name, model.settings, out or (Path(model.sidecar).expanduser() if model.sidecar else None)


def _check_has_sidecar(model: "RecipeModel", recipe: str) -> None:
    """A model without data must have been measured by somebody else."""
    from fisher_mask_mergekit import store
    from fisher_mask_mergekit.checkpoint import locate

    found = model.sidecar or store.find(locate(model.name))
    if found is None:
        raise RecipeError(
            f"{recipe}: {model.name} has no sidecar and no data to measure it on; "
            "add  fisher: {data: DATASET}  beside it"
        )
    _say(f"{model.name}: no data in the recipe; its sidecar is {found}")


def _parse_label_map(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and sign and value.strip() for key, sign, value in pairs):
        raise RecipeError(f"--label-map: expected DATA=CHECKPOINT pairs with commas between, got '{text}'")
    return {key.strip(): value.strip() for key, _, value in pairs}


@contextmanager
def _progress(name: str) -> Iterator[tuple[Any, Any]]:
    """A bar on standard error with samples, tokens per second and remaining time."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, {task.fields[speed]:,.0f} tokens/s,"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),  # Else it leaves an empty line.
    ) as bar:
        task = bar.add_task(name, total=None, speed=0.0)
        started = time.perf_counter()
        tokens = 0

        def on_start(samples: int) -> None:
            nonlocal started
            started = time.perf_counter()
            bar.update(task, total=samples)

        def on_batch(batch: Any) -> None:
            nonlocal tokens
            mask = batch.inputs.get("attention_mask", batch.inputs["input_ids"])
            tokens += int(mask.count_nonzero())
            bar.update(task, advance=len(batch.index), speed=tokens / (time.perf_counter() - started))

        yield on_start, on_batch


def _silence_progress_bars() -> None:
    """The libraries' own bars, for loading weights and data, would break ours."""
    import datasets

    datasets.disable_progress_bars()
    _silence_loading()


def _silence_loading() -> None:
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _report(name: str, outcome: "Outcome") -> None:
    for note in outcome.notes:
        _say(note)
    metadata = outcome.sidecar.metadata
    how = "measured before" if outcome.served else f"{outcome.seconds:.1f} s on {metadata.device}"
    accuracy = "" if metadata.accuracy is None else f"accuracy {metadata.accuracy:.3f}, "
    print(f"{name}: {metadata.samples} samples, {accuracy}loss {metadata.loss:.4f}, {how}, {outcome.path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what a user can cause into one message and an exit code."""
    try:
        yield
    except FisherMaskError as error:
        _say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _say("interrupted; no unfinished file was left")
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
