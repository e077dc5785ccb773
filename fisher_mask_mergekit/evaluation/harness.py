"""Causal LMs on tasks of lm-evaluation-harness, which is no requirement of this package."""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from fisher_mask_mergekit.checkpoint import Checkpoint, locate
from fisher_mask_mergekit.errors import CheckpointError, FisherMaskError, RecipeError, first_line
from fisher_mask_mergekit.evaluation.metrics import Metric, Scorer, ratio_of_sums
from fisher_mask_mergekit.evaluation.plan import Options, merge_lines
from fisher_mask_mergekit.evaluation.predictions import Array, Predictions
from fisher_mask_mergekit.evaluation.run import Evaluation, checkpoint_parts
from fisher_mask_mergekit.evaluation.scores import OWN, Results, TaskScores, score_task
from fisher_mask_mergekit.heads import short_names
from fisher_mask_mergekit.loading import load_config
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.store import cache_folder, write_whole
from fisher_mask_mergekit.tasks import task_of

# How the harness makes one number of its samples': a mean, or the exponential of one.
_AGGREGATIONS: Mapping[str, Any] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: numpy.exp(-ratio),
    "bits": lambda ratio: -ratio / math.log(2),
}


def harness(
    recipe: Recipe,
    merged: Sequence[str],
    tasks: Sequence[str],
    device: torch.device,
    options: Options,
    *,
    force: bool = False,
) -> Evaluation:
    """Put every model of a recipe, and every merge as it is, to the same tasks.

    Args:
        recipe: What was merged.
        merged: Merged folders.
        tasks: As the harness names them.
        device: Where to run.
        options: How.
        force: Run also what was run before.

    Raises:
        RecipeError: If the harness is not installed, or refuses a task.
        CheckpointError: If a model is no causal LM.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise RecipeError("--lm-eval needs lm-evaluation-harness:  pip install 'lm-eval[hf]'") from error
    models = [model for model in recipe.models if model.is_merged]
    own = [_causal(model.name, model, options) for model in models]
    merges = merge_lines(merged)
    encoders = [_causal(folder, models[0], options) for folder in merged]
    runs, notes, found = 0, [], {}
    for checkpoint in (*own, *encoders):
        dtype = models[0].request.dtype
        path = cache_folder() / "evaluations" / f"{_key(checkpoint, tasks, dtype, options)}.json"
        kept = None if force else _kept(path)
        if kept is None:
            runs += 1
            kept, left_out = _run(lm_eval, checkpoint, tasks, device, dtype, options)
            notes += left_out
            with suppress(OSError):  # The next call runs it again, no more.
                write_whole(path, json.dumps(kept).encode())
        found[checkpoint.name] = kept
    rows = []
    for name, model, checkpoint in zip(short_names([one.name for one in models]), models, own, strict=True):
        lines = {OWN: found[checkpoint.name]}
        lines |= {line: found[folder.name] for line, folder in zip(merges, encoders, strict=True)}
        rows += [_scores(name, model, task, lines, options) for task in lines[OWN]]
    return Evaluation(Results(rows, merges), runs, tuple(dict.fromkeys(notes)))


def _causal(name: str, model: RecipeModel, options: Options) -> Checkpoint:
    checkpoint = locate(name)
    config = load_config(checkpoint, trust_remote_code=options.trust_remote_code)
    kind = task_of(config, name, model.request).kind
    if kind != "causal-lm":
        raise CheckpointError(f"--lm-eval takes causal LMs, and {name} is made for {kind}")
    return checkpoint


def _key(checkpoint: Checkpoint, tasks: Sequence[str], dtype: str, options: Options) -> str:
    try:
        harness_version = version("lm-eval")
    except PackageNotFoundError:
        harness_version = "unknown"
    parts = checkpoint_parts(checkpoint) | {
        "lm_eval": [harness_version, *tasks],
        "limit": options.samples,
        "seed": options.seed,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _kept(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _run(
    lm_eval: Any,
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    device: torch.device,
    dtype: str,
    options: Options,
) -> tuple[dict[str, Any], list[str]]:
    """Per task of the harness, its metrics and each sample's part in them; and what was left out."""
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(checkpoint.folder),
                "dtype": dtype,
                "trust_remote_code": options.trust_remote_code,
            },
            tasks=list(tasks),
            batch_size=options.batch_size,
            device=str(device),
            limit=options.samples,
            log_samples=True,
            random_seed=options.seed,
        )
    except FisherMaskError:
        raise
    except Exception as error:  # The harness raises whatever its tasks, the hub and the model do.
        raise RecipeError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)} on {checkpoint.name}: {first_line(error)}"
        ) from error
    kept, notes = {}, []
    for task, samples in found["samples"].items():
        metrics, unknown = _metrics(found["results"][task], samples, found["higher_is_better"].get(task, {}))
        if unknown:
            notes.append(f"{task}: left out {', '.join(unknown)}: not told by single samples' values")
        if not metrics:
            raise RecipeError(f"lm-eval task {task} has no metric that is told by single samples' values")
        kept[task] = metrics
    return kept, notes


def _metrics(
    results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], directions: Mapping[str, bool | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Metrics of one task with each sample's part; and the names of those that are none of the samples' means."""
    metrics, unknown = [], []
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        parts = [_part(sample.get(name)) for sample in samples if sample.get("filter", kind) == kind]
        label = name if kind == "none" else f"{name} ({kind})"
        how = None if None in parts else _aggregation(numpy.array(parts, dtype=float), value)
        if how is None:
            unknown.append(label)
        else:
            better = directions.get(name) is not False
            metrics.append({"name": label, "higher_is_better": better, "aggregation": how, "parts": parts})
    return metrics, unknown


def _part(value: Any) -> tuple[float, float] | None:
    """A sample's value and its weight; None if it is neither a number nor a pair of them."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, 1.0)
    plain = len(pair) == 2 and all(isinstance(one, int | float | numpy.number) for one in pair)
    return (float(pair[0]), float(pair[1])) if plain else None


def _aggregation(parts: Array, value: float) -> str | None:
    """The way from the samples' values to the one that the harness gives."""
    if len(parts) == 0:
        return None
    with numpy.errstate(all="ignore"):
        ratio = parts[:, 0].sum() / parts[:, 1].sum()
        fits = (
            how
            for how, of in _AGGREGATIONS.items()
            if math.isclose(of(ratio), value, rel_tol=1e-6, abs_tol=1e-9)
        )
        return next(fits, None)  # fmt: skip


def _scores(
    name: str, model: RecipeModel, task: str, lines: Mapping[str, Any], options: Options
) -> TaskScores:
    wanted = model.evaluation.metric
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    first = {metric["name"]: metric for metric in lines[OWN][task]}
    unknown = [one for one in wanted or () if one not in first]
    if unknown:
        raise RecipeError(f"lm-eval task {task} has no metric '{unknown[0]}'; it has {', '.join(first)}")
    names = list(wanted or first)
    predictions = {line: _predictions(found[task], names) for line, found in lines.items()}
    metrics = tuple(
        Metric(
            one,
            ("lm-eval",),
            partial(_scorer, column=column, aggregation=first[one]["aggregation"]),
            first[one]["higher_is_better"],
        )
        for column, one in enumerate(names)
    )
    seed = (options.seed, zlib.crc32(task.encode()))
    return score_task(f"{name}: {task}", model.name, f"lm-eval {task}", metrics, predictions, seed)


def _predictions(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Predictions:
    """Values ``[N, 2 M]``: of every metric, a sample's value and its weight."""
    parts = {metric["name"]: numpy.array(metric["parts"], dtype=float) for metric in metrics}
    values = numpy.concatenate([parts[name] for name in names], 1)
    return Predictions(len(values), numpy.arange(len(values)), values, values, numpy.empty(0))


def _scorer(predictions: Predictions, column: int, aggregation: str) -> Scorer:
    sums, weights = predictions.predicted[:, 2 * column], predictions.predicted[:, 2 * column + 1]
    return ratio_of_sums(sums, weights, _AGGREGATIONS[aggregation])
