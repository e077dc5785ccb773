"""Several ways to merge the same checkpoints, each merge scored on every checkpoint's task.

Everything is kept in a work folder: sidecars, and a file of results per set of checkpoints, so that a run that was
interrupted goes on where it was. All ways' merges of a set are in memory at once.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
import transformers
import yaml
from ways import Way

from fisher_mask_mergekit.checkpoint import locate, read_tensors, tensor_shapes
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.evaluation.plan import Merge, Options, Subject, plan_merges, subjects
from fisher_mask_mergekit.evaluation.run import evaluate
from fisher_mask_mergekit.evaluation.table import record as record_of
from fisher_mask_mergekit.execution import pick_device
from fisher_mask_mergekit.heads import is_head, short_names
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Measurement, digest_of
from fisher_mask_mergekit.store import write_whole


@dataclass(frozen=True)
class Bench:
    """What is compared, and where.

    Attributes:
        subjects: The checkpoints, and what each is scored on.
        parent: What all of them were fine-tuned from.
        work: The folder for everything that is kept.
        options: How merges are scored.
        device: Where models run.
        sidecars: What was looked at already, by path and settings.
    """

    subjects: Sequence[Subject]
    parent: Path | None
    work: Path
    options: Options
    device: torch.device
    sidecars: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the figures hang on."""
        return {
            "checkpoints": {one.name: one.model.name for one in self.subjects},
            "rows": {one.name: len(one.samples.texts) for one in self.subjects},
            "data": {one.name: one.settings.data for one in self.subjects},
            "pooler": self.options.pooler,
            "batch_size": self.options.batch_size,
            "dtype": self.subjects[0].settings.dtype,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": {
                name: version(name) for name in ("fisher-mask-mergekit", "mergekit", "torch", "transformers")
            },
        }


def arguments(description: str) -> argparse.ArgumentParser:
    """What every comparison can be told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", type=Path, help="a recipe: its models, and what to measure and to score each on"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for sidecars and results; a later run goes on"
    )
    parser.add_argument("--models", help="short names, with commas between [default: all of the recipe's]")
    parser.add_argument("--rows", type=int, help="rows to score on, drawn from each data set [default: all]")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="to score in; merges and measurements keep the recipe's [default: %(default)s]",
    )
    parser.add_argument(
        "--pooler", choices=("own", "average"), default="own", help="as of mergekit-fisher evaluate"
    )
    parser.add_argument(
        "--parent", type=Path, help="what the checkpoints were fine-tuned from, for methods that need it"
    )
    parser.add_argument("--device", help="[default: cuda, else xpu, mps, cpu]")
    return parser


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    """Let a comparison be told what other runs of it wrote."""
    parser.add_argument(
        "--add",
        type=_runs_in,
        action="extend",
        metavar="JSON",
        default=[],
        help="what an earlier run wrote, of models that other seeds trained for the same tasks: put in front; may be repeated",
    )


def _runs_in(path: str) -> list[dict[str, Any]]:
    try:
        runs: list[dict[str, Any]] = json.loads(Path(path).read_text())["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{path} is not what this comparison writes: {error!r}") from error
    return runs


def with_runs(given: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of before, and this one, as they are written down."""
    return {"runs": [*given.add, own]}


def bench(given: argparse.Namespace) -> Bench:
    """What was asked for, looked into."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options = Options(samples=given.rows, pooler=given.pooler)
    recipe = read_recipe(given.recipe)
    if given.models:
        names = short_names([model.name for model in recipe.models])
        known = dict(zip(names, recipe.models, strict=True))
        wanted = given.models.split(",")
        if unknown := [name for name in wanted if name not in known]:
            raise SystemExit(f"{given.recipe} has no {unknown[0]}; it has {', '.join(known)}")
        recipe = replace(recipe, models=tuple(known[name] for name in wanted))
    found = [
        replace(
            one,
            settings=one.settings.model_copy(update={"dtype": given.dtype}),
            # Every way gives all models the same weight; so must an average of their poolers.
            model=replace(one.model, weight=1.0),
        )
        for one in subjects(recipe, options)
    ]
    return Bench(found, given.parent, given.work, options, pick_device(given.device))


def groups_of(found: Sequence[Subject], count: int, most: int | None = None) -> list[tuple[Subject, ...]]:
    """Combinations of so many checkpoints, in an order that is drawn, always the same; all of them, or the first ``most``."""
    groups = list(combinations(found, count))
    return Random(0).sample(groups, len(groups) if most is None else min(most, len(groups)))


class Merger(Protocol):
    """What merges in a way that mergekit does not know."""

    def __call__(self, group: Sequence[Subject], first: Merge) -> Merge:
        """A merge of checkpoints, of which the first way's merge is given."""

    def key(self, group: Sequence[Subject]) -> Any:
        """What its merge of them depends on, beside all that the merges of mergekit do."""


def compare(
    setting: Bench,
    groups: Iterable[Sequence[Subject]],
    ways: Sequence[Way],
    mergers: Mapping[str, Merger] | None = None,
) -> list[dict[str, Any]]:
    """Merge every group in every way and score the merges on the group's tasks.

    Args:
        setting: What and where.
        groups: Of checkpoints.
        ways: The first is what the others are compared with.
        mergers: What merges in ways that mergekit does not know, by their names.

    Returns:
        Per group, ``models`` and ``results``: what tables need of what ``mergekit-fisher evaluate --json`` writes. The
        rest stays in the work folder.
    """
    found = []
    for group in groups:
        path = setting.work / "results" / f"{results_key(setting, group, ways, mergers or {})}.json"
        if not path.is_file():
            started = time.perf_counter()
            results = _compare_group(setting, group, ways, mergers or {})
            record = {"models": [one.name for one in group], "results": results}
            write_whole(path, json.dumps(record).encode())
            print(f"{' + '.join(record['models'])}: {time.perf_counter() - started:.0f} s", flush=True)
        known = json.loads(path.read_text())
        found.append({"models": known["models"], "results": _shown(known["results"])})
    return found


def _shown(results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "merges": results["merges"],
        "tasks": [
            {name: one[name] for name in ("task", "rows", "metrics", "normalised")}
            for one in results["tasks"]
        ],
        "differences": [
            {name: one[name] for name in ("merge", "minus", "normalised_mean")}
            for one in results["differences"]
        ],
    }


def results_key(
    setting: Bench, group: Sequence[Subject], ways: Sequence[Way], mergers: Mapping[str, Merger]
) -> str:
    """Of everything that a group's results depend on."""
    parts = {
        "models": [_weights(one.model.name) for one in group],
        "names": [one.name for one in group],
        "parent": next((_weights(_parent(setting, way)) for way in ways if way.with_parent), None),
        "ways": [repr(way) for way in ways],
        "measured": [
            [_described(sidecar(setting, one, way)[1]) for one in group] for way in ways if way.measured
        ],
        "data": [one.samples.record.digest for one in group],
        "metrics": [[metric.name for metric in one.metrics] for one in group],
        "options": repr(setting.options),
        "dtype": group[0].settings.dtype,
        "versions": setting.facts()["versions"],
    }
    if mergers:
        parts["mergers"] = [merger.key(group) for merger in mergers.values()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache
def _weights(name: str) -> str:
    checkpoint = locate(name)
    return digest_of(read_tensors(checkpoint, tensor_shapes(checkpoint)))


def _described(metadata: Measurement) -> list[str]:
    return [metadata.weights, metadata.data.digest, metadata.settings.model_dump_json()]


def _compare_group(
    setting: Bench, group: Sequence[Subject], ways: Sequence[Way], mergers: Mapping[str, Merger]
) -> dict[str, Any]:
    merges: list[Merge] = []
    for way in ways:
        own = mergers.get(way.name)
        merges.append(own(group, merges[0]) if own else _merge(setting, group, way))
    found = evaluate(plan_merges(group, merges, setting.options), setting.device, _no_progress)
    for note in found.notes:
        print(note, file=sys.stderr)
    return record_of(found.results)


@contextmanager
def _no_progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[Any], None]]]:
    yield (lambda samples: None, lambda batch: None)


def _merge(setting: Bench, group: Sequence[Subject], way: Way) -> Merge:
    """In memory, by mergekit."""
    torch.manual_seed(0)  # For the methods that draw.
    encoder, config = merge_in_memory(recipe_of(setting, group, way), way.name)
    return Merge(way.name, encoder, config=config)


def recipe_of(setting: Bench, group: Sequence[Subject], way: Way) -> dict[str, Any]:
    """A recipe as mergekit takes it."""
    if way.with_parent and not way.measured:
        document = _parent_recipe(setting, group, way)
    else:
        document = yaml.safe_load(draft_recipe([one.model.name for one in group]))
        sidecars = {one.model.name: sidecar(setting, one, way)[0] for one in group} if way.measured else {}
        for part in entries(document):
            part["parameters"] = {"weight": 1.0, **way.each}
            if sidecars:
                part["parameters"]["sidecar"] = str(
                    next(p for n, p in sidecars.items() if same(n, part["model"]))
                )
        if way.with_parent:
            _put_parent(document, str(_same_head(setting, _parent(setting, way))))
    return document | {"merge_method": way.method, "parameters": dict(way.parameters), "dtype": "float32"}


def entries(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All places of a drafted recipe that name a model to merge."""
    yield from document.get("models", ())
    for one in document.get("slices", ()):
        yield from one["sources"]


def same(name: str, written: str) -> bool:
    """A draft names folders by their absolute path."""
    return written in (name, str(Path(name).resolve()))


def sidecar(setting: Bench, subject: Subject, way: Way) -> tuple[Path, Measurement]:
    """What is measured of a checkpoint for a way to merge; measured unless the very same was before."""
    settings = way.settings(subject.model.request, subject.config.num_labels)
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:12]
    path = setting.work / "sidecars" / subject.name / sidecar_name(digest, settings)
    key = str(path), subject.model.name
    if key not in setting.sidecars:
        path.parent.mkdir(parents=True, exist_ok=True)
        outcome = compute(prepare(subject.model.name, settings, out=path), setting.device)
        for note in () if outcome.served else outcome.notes:
            print(f"{subject.name}: {note}", file=sys.stderr)
        setting.sidecars[key] = outcome.sidecar.metadata
    return path, setting.sidecars[key]


def sidecar_name(stem: str, settings: FisherSettings) -> str:
    """What a sidecar is to be called: a file, or of the diagonal a folder."""
    return stem if settings.kind == "diagonal" else f"{stem}.safetensors"


def _parent_recipe(setting: Bench, group: Sequence[Subject], way: Way) -> dict[str, Any]:
    """A recipe with the common parent as base: mergekit asks for it in every tensor, heads included.

    So all of them are given one and the same head; the tasks' own are put on afterwards, as for every merge.
    """
    parent = _parent(setting, way)
    if other := [one.name for one in group if one.task.name != "sequence-classification"]:
        raise SystemExit(f"{way.name} is compared on sequence classifiers only, and {other[0]} is none")
    folders = [_same_head(setting, one.model.name) for one in group]
    return {
        "base_model": str(_same_head(setting, parent)),
        "models": [{"model": str(folder), "parameters": dict(way.each)} for folder in folders],
    }


def _parent(setting: Bench, way: Way) -> str:
    if setting.parent is None:
        raise SystemExit(f"{way.name} needs --parent")
    return str(setting.parent)


def _put_parent(document: dict[str, Any], parent: str) -> None:
    """Make the parent the base model of what is merged, and of nothing that is taken from one model."""
    if "slices" not in document:
        document["base_model"] = parent
        return
    body = next(one for one in document["slices"] if len(one["sources"]) > 1)
    body["base_model"] = parent
    body["sources"].append({"model": parent, "layer_range": body["sources"][0]["layer_range"]})


def _same_head(setting: Bench, name: str) -> Path:
    """A copy of a checkpoint with a head of zeros for two labels."""
    folder = setting.work / "same-head" / _weights(name)[:12]
    if not folder.exists():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        with torch.no_grad():
            for tensor_name, tensor in model.named_parameters():
                if is_head(tensor_name):
                    tensor.zero_()
        temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
        model.save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(temporary)  # Another run in the same work folder was first.
    return folder.resolve()


def with_settings(subject: Subject, **changes: Any) -> Subject:
    """A subject whose measurements differ from the recipe's."""
    request = subject.model.request.model_copy(update=changes)
    return replace(subject, model=replace(subject.model, request=request))


def write(path: Path, record: Mapping[str, Any], markdown: Callable[[Any], Mapping[str, str]]) -> None:
    """What was found: as JSON with all that it hangs on, and its tables, made from that JSON, which are printed too."""
    rounded = json.loads(json.dumps(record), parse_float=lambda number: round(float(number), 4))
    text = "\n\n".join(f"{title}:\n\n{table}" for title, table in markdown(rounded).items())
    write_whole(path.with_suffix(".json"), f"{json.dumps(rounded)}\n".encode())
    write_whole(path.with_suffix(".md"), f"{text}\n".encode())
    print(text)
