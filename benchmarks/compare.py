"""Several ways to merge the same checkpoints, each merge scored on every checkpoint's task.

Everything is kept in a work folder: sidecars, and one line of results per set of checkpoints, so that a run that was
interrupted goes on where it was.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from ways import Way

from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.evaluation.plan import Merge, Options, Subject, plan_merges, subjects
from fisher_mask_mergekit.evaluation.run import evaluate
from fisher_mask_mergekit.evaluation.table import record
from fisher_mask_mergekit.heads import is_head, short_names
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute, pick_device
from fisher_mask_mergekit.recipe import read_recipe


@dataclass(frozen=True)
class Bench:
    """What is compared, and where.

    Attributes:
        subjects: The checkpoints, and what each is scored on.
        parent: What all of them were fine-tuned from.
        work: The folder for everything that is kept.
        options: How merges are scored.
        device: Where models run.
    """

    subjects: Sequence[Subject]
    parent: Path | None
    work: Path
    options: Options
    device: torch.device

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
        replace(one, settings=one.settings.model_copy(update={"dtype": given.dtype}))
        for one in subjects(recipe, options)
    ]
    return Bench(found, given.parent, given.work, options, pick_device(given.device))


def compare(setting: Bench, groups: Iterable[Sequence[Subject]], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Merge every group in every way and score the merges on the group's tasks.

    Args:
        setting: What and where.
        groups: Of checkpoints.
        ways: The first is what the others are compared with.

    Returns:
        Per group, ``models`` and ``results``, as ``mergekit-fisher evaluate --json`` writes them.
    """
    path = setting.work / "results.jsonl"
    setting.work.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {line["key"]: line for line in map(json.loads, lines)}
    found = []
    for group in groups:
        key = _key(setting, group, ways)
        if key not in known:
            started = time.perf_counter()
            known[key] = {
                "key": key,
                "models": [one.name for one in group],
                "results": _compare_group(setting, group, ways),
            }
            with path.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(
                f"{' + '.join(one.name for one in group)}: {time.perf_counter() - started:.0f} s", flush=True
            )
        found.append(known[key])
    return found


def _key(setting: Bench, group: Sequence[Subject], ways: Sequence[Way]) -> str:
    parts = {
        "models": [one.model.name for one in group],
        "requests": [one.model.request.model_dump() for one in group],
        "data": [one.samples.record.digest for one in group],
        "ways": [repr(way) for way in ways],
        "pooler": setting.options.pooler,
        "dtype": group[0].settings.dtype,
        "versions": setting.facts()["versions"],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compare_group(setting: Bench, group: Sequence[Subject], ways: Sequence[Way]) -> dict[str, Any]:
    merges = [_merge(setting, group, way) for way in ways]
    return record(evaluate(plan_merges(group, merges, setting.options), setting.device, _no_progress).results)


@contextmanager
def _no_progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[Any], None]]]:
    yield (lambda samples: None, lambda batch: None)


def _merge(setting: Bench, group: Sequence[Subject], way: Way) -> Merge:
    """In memory, by mergekit."""
    torch.manual_seed(0)  # For the methods that draw.
    if way.with_parent:
        document = _parent_recipe(setting, group, way)
    else:
        document = yaml.safe_load(draft_recipe([one.model.name for one in group]))
        sidecars = {one.model.name: sidecar(setting, one, way) for one in group} if way.measured else {}
        for part in (
            *document.get("models", ()),
            *(s for one in document.get("slices", ()) for s in one["sources"]),
        ):
            part["parameters"] = {"weight": 1.0, **way.each}
            if sidecars:
                part["parameters"]["sidecar"] = str(
                    next(p for n, p in sidecars.items() if _same(n, part["model"]))
                )
    document |= {"merge_method": way.method, "parameters": dict(way.parameters), "dtype": "float32"}
    encoder, config = merge_in_memory(document, way.name)
    return Merge(way.name, encoder, config=config)


def _same(name: str, written: str) -> bool:
    """A draft names folders by their absolute path."""
    return written in (name, str(Path(name).resolve()))


def sidecar(setting: Bench, subject: Subject, way: Way) -> Path:
    """What is measured of a checkpoint for a way to merge; measured if it was not before."""
    settings = way.settings(subject.model.request, subject.config.num_labels)
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:12]
    suffix = ".safetensors" if settings.kind == "mask" else ""  # The other kind is a folder.
    path = setting.work / "sidecars" / subject.name / f"{digest}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        compute(prepare(subject.model.name, settings, out=path), setting.device)
    return path


def _parent_recipe(setting: Bench, group: Sequence[Subject], way: Way) -> dict[str, Any]:
    """A recipe with the common parent as base: mergekit asks for it in every tensor, heads included.

    So all of them are given one and the same head; the tasks' own are put on afterwards, as for every merge.
    """
    if setting.parent is None:
        raise SystemExit(f"{way.name} needs --parent")
    folders = {one.name: _same_head(one.model.name, setting.work / "same-head" / one.name) for one in group}
    base = _same_head(str(setting.parent), setting.work / "same-head" / "parent")
    return {
        "base_model": str(base),
        "models": [{"model": str(folder), "parameters": dict(way.each)} for folder in folders.values()],
    }


def _same_head(name: str, folder: Path) -> Path:
    """A copy of a checkpoint with a head of zeros for two labels."""
    if not folder.exists():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2, ignore_mismatched_sizes=True, dtype=torch.float32
        )
        with torch.no_grad():
            for tensor_name, tensor in model.named_parameters():
                if is_head(tensor_name):
                    tensor.zero_()
        temporary = folder.with_name(f".{folder.name}")
        model.save_pretrained(temporary)
        temporary.rename(folder)
    return folder.resolve()


def with_settings(subject: Subject, **changes: Any) -> Subject:
    """A subject whose measurements differ from the recipe's."""
    request = subject.model.request.model_copy(update=changes)
    return replace(subject, model=replace(subject.model, request=request))


def write(path: Path, record: Mapping[str, Any], tables: Mapping[str, str]) -> None:
    """What was found: as JSON with all that it hangs on, and its tables as Markdown, which is printed too."""
    text = "\n\n".join(f"{title}:\n\n{table}" for title, table in tables.items())
    path.with_suffix(".json").write_text(json.dumps(record) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
