"""``mergekit-fisher tune``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisher_mask_mergekit.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Metric,
    Pooler,
    TrustRemoteCode,
    scoring_overrides,
)
from fisher_mask_mergekit.cli.output import errors, print_lines, say, silence_progress_bars, trial_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fisher_mask_mergekit.tuning.study import Study
    from fisher_mask_mergekit.tuning.tune import Tuning


def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What to tune.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Gets the best recipe; its trials lie beside it.")
    ],
    trials: Annotated[
        int,
        typer.Option(min=1, help="Merges to try, the recipe as it is among them. Those made before count."),
    ] = 50,
    samples: Annotated[
        int, typer.Option(min=1, help="Rows of each model's training data to hold back and score on.")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    metric: Metric = None,
    pooler: Pooler = "own",
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Search for a recipe's weights, normalize and prior, on training rows that were not measured on."""
    with errors():
        from fisher_mask_mergekit.evaluation.plan import Options
        from fisher_mask_mergekit.execution import pick_device
        from fisher_mask_mergekit.recipe import read_recipe
        from fisher_mask_mergekit.tuning.tune import claimed, prepare, run

        options = Options(None, seed, batch_size, pooler, trust_remote_code)
        read = read_recipe(recipe, scoring_overrides(metric, dtype))
        silence_progress_bars()
        with claimed(out):
            tuning = prepare(read, out, samples, options, pick_device(device))
            for note in tuning.notes:
                say(note)
            with trial_progress(trials) as on_trial:
                study = run(tuning, trials, on_trial)
        print_lines(_report(tuning, study))


def _report(tuning: "Tuning", study: "Study") -> "Iterator[str]":
    """The recipe as it is against the best trial, what that can tell, and what to run next."""
    from shlex import quote

    from fisher_mask_mergekit.evaluation.scores import OWN
    from fisher_mask_mergekit.evaluation.table import aligned
    from fisher_mask_mergekit.heads import short_names
    from fisher_mask_mergekit.tuning.tune import described

    pair = (study.trials[0], study.best)
    rows = [["", OWN, "recipe as it is", f"trial {study.best.number}, the best of {len(study.trials)}"]]
    models = list(study.trials[0].weights)
    for short, name in zip(short_names(models), models, strict=True):
        rows.append([f"weight of {short}", "", *(f"{one.weights[name]:.4g}" for one in pair)])
    if study.best.normalize is not None:
        rows.append(["normalize", "", *(str(one.normalize) for one in pair)])
    if tuning.own.prior is not None:
        rows.append(["prior", "", *(f"{one.prior or tuning.own.prior:.4g}" for one in pair)])
    for one in tuning.subjects:
        cells = [described(each.scores[one.name], 3) for each in pair]
        rows.append([f"{one.name} {one.metrics[0].name}", described(study.own[one.name], 3), *cells])
    rows.append(["mean normalised", "100", *(described(one.value) for one in pair)])
    yield from aligned(rows).split("\n")
    yield ""
    yield f"Held-back training rows: {tuning.rows}."
    yield (
        "The best of many on these rows looks better than it is; whether it helps, only rows tell that nothing was "
        "chosen by:"
    )
    yield ""
    untuned, tuned = quote(str(tuning.recipe.path)), quote(str(tuning.out))
    stems = [tuning.recipe.path.stem, tuning.out.stem]
    if stems[0] == stems[1]:
        stems[1] += "-tuned"
    names = [quote(f"merged-{stem}") for stem in stems]
    yield f"    mergekit-yaml {untuned} {names[0]}"
    yield f"    mergekit-yaml {tuned} {names[1]}"
    yield f"    mergekit-fisher evaluate {untuned} {' '.join(names)}"
