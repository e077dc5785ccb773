"""The demo step by step, with the commands a user would type."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from fisher_mask_mergekit.demo.commands import run_command, spell
from fisher_mask_mergekit.demo.sizes import SEED, Sizes
from fisher_mask_mergekit.demo.training import Rows, fine_tune, pretrain, save_as_classifier, train_tokenizer
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.recipe import METHOD

TASKS = ("banking77", "clinc150")
# The first is what the others are compared with.
_RECIPES = {"average": "average.yml", "fisher_mask": "recipe.yml", "from_parent": "from_parent.yml"}
# What is evaluated on lies beside what was trained on. The pattern means the same to Python and to `sed -E`.
_TRAIN, _AND_HELD_OUT = r'"(.*)_train\.jsonl"', r', eval: "\1_held_out.jsonl"'
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """A bundled data set: its files' rows, and all its label names in the order of their indices."""

    name: str
    labels: tuple[str, ...]
    train: Rows
    held_out: Rows


def tell(out: Path, say: Say, sizes: Sizes) -> None:
    """Tell the story in an empty folder, see :func:`fisher_mask_mergekit.demo.run_demo`."""
    started = time.perf_counter()
    tasks = [_bring(name, out / "data", sizes) for name in TASKS]
    counts = "; ".join(
        f"{task.name}, {len(task.labels)} labels, {len(task.train.texts)} training and "
        f"{len(task.held_out.texts)} held-out rows"
        for task in tasks
    )
    say(f"[1/6] Two tasks of real text: {counts}.")
    _train(out, tasks, say, sizes)
    _draft(out, say)
    _measure(out, say)
    _merge(out, say)
    _evaluate(out, say)
    say(_where(out))
    versions = ", ".join(f"{name} {version(name)}" for name in ("mergekit", "torch", "transformers"))
    say(f"Done in {time.perf_counter() - started:.0f} s, with seed {SEED}, {versions}.")


def _bring(name: str, folder: Path, sizes: Sizes) -> _Task:
    """Copy a bundled data set to where a recipe can name it."""
    folder.mkdir(exist_ok=True)
    rows: dict[str, Rows] = {}
    labels: tuple[str, ...] = ()
    for part, limit in (("train", sizes.train_rows), ("held_out", sizes.held_out_rows)):
        file = f"{name}_{part}.jsonl"
        lines = (resources.files(__package__) / "data" / file).read_text(encoding="utf-8").splitlines()
        (folder / file).write_text("\n".join(lines[:limit]) + "\n", encoding="utf-8")
        found = [json.loads(line) for line in lines]
        labels = labels or tuple(sorted({row["label"] for row in found}))
        rows[part] = Rows(
            tuple(row["text"] for row in found[:limit]), tuple(row["label"] for row in found[:limit])
        )
    return _Task(name, labels, rows["train"], rows["held_out"])


def _train(out: Path, tasks: list[_Task], say: Say, sizes: Sizes) -> None:
    say(
        f"[2/6] Make a BERT of {sizes.layers} layers with {sizes.heads} heads and {sizes.neurons} neurons each: "
        "masked-LM training on both tasks' training texts, then fine-tuning on each task."
    )
    texts = [text for task in tasks for text in task.train.texts]
    parent = out / "pretrained"
    tokenizer = train_tokenizer(texts, sizes)
    started = time.perf_counter()
    first, last = pretrain(texts, tokenizer, sizes, parent)
    say(f"    {parent}: masked-LM loss {first:.2f} to {last:.2f}, {time.perf_counter() - started:.0f} s")
    save_as_classifier(parent, out / "parent")
    say(
        f"    {out / 'parent'}: the same as a classifier, with a head that is not used: mergekit merges models of one class"
    )
    for task in tasks:
        folder = out / "models" / task.name
        started = time.perf_counter()
        fine_tune(task.train, task.labels, parent, sizes, folder)
        say(f"    {folder}: {len(task.labels)} labels, {time.perf_counter() - started:.0f} s")


def _draft(out: Path, say: Say) -> None:
    """The recipe, the same one for plain averaging, and one that adds up what the models changed of their parent."""
    models = [str(out / "models" / name) for name in TASKS]
    data = [str(out / "data" / f"{name}_train.jsonl") for name in TASKS]
    options = [word for file in data for word in ("--data", file)]
    recipe, average, summed = (out / _RECIPES[name] for name in ("fisher_mask", "average", "from_parent"))
    method, plain = f"merge_method: {METHOD}", "merge_method: linear"
    say(
        "[3/6] Write the recipe, a second one that only averages, and a third that adds up what the models changed of their "
        "parent, as far as the Fisher information lets them."
    )
    init = ["mergekit-fisher", "init", *models, *options]
    held_out = ["sed", "-E", f"s/{_TRAIN}/&{_AND_HELD_OUT}/"]
    parent = str(out / "parent")
    say(spell(init, held_out, to=recipe))
    say(spell(["sed", f"s/{method}/{plain}/", str(recipe)], to=average))
    say(spell([*init, "--parent", parent], held_out, to=summed))
    text, from_parent = (
        re.sub(_TRAIN, rf"\g<0>{_AND_HELD_OUT}", draft_recipe(models, data, given))
        for given in (None, parent)
    )
    recipe.write_text(text, encoding="utf-8")
    average.write_text(text.replace(method, plain), encoding="utf-8")
    summed.write_text(from_parent, encoding="utf-8")


def _measure(out: Path, say: Say) -> None:
    say(
        "[4/6] Measure and draw the Fisher information of both models' mask nodes; see whether the merge will do."
    )
    recipe = str(out / "recipe.yml")
    for name in ("compute", "check"):
        for line in _run(["mergekit-fisher", name, recipe], say).splitlines():
            say(f"    {line}")
    pictures = ["--html", str(out / "fisher.html"), "--png", str(out / "fisher.png")]
    _run(["mergekit-fisher", "inspect", recipe, *pictures], say)


def _merge(out: Path, say: Say) -> None:
    say("[5/6] Merge with each recipe; give each task its own head on the merged encoder.")
    for name, recipe in _RECIPES.items():
        merged = str(out / "merged" / name)
        _run(["mergekit-yaml", str(out / recipe), merged], say)
        _run(["mergekit-fisher", "heads", str(out / recipe), merged, str(out / "tasks" / name)], say)


def _evaluate(out: Path, say: Say) -> None:
    say("[6/6] Score the merges on the held-out rows, beside each task's own model.")
    merged = [str(out / "merged" / name) for name in _RECIPES]
    files = {"--json": "results.json", "--markdown": "results.md", "--html": "report.html"}
    options = [word for option, name in files.items() for word in (option, str(out / name))]
    table = _run(["mergekit-fisher", "evaluate", str(out / "recipe.yml"), *merged, *options], say)
    why = "Normalised: per cent of the fine-tuned model's own accuracy. A tie: the interval contains 0."
    for line in ("", *table.split("\n"), why, ""):
        say(line)


def _run(command: Sequence[str], say: Say) -> str:
    say(spell(command))
    return run_command(command)


def _where(out: Path) -> str:
    places: Mapping[str, str] = {
        "results.md, results.json": "the scores",
        "report.html": "a page with the scores, side by side",
        "fisher.html": "a page with each model's Fisher information and its share of every layer",
        "fisher.png": "the Fisher information of each model's mask nodes",
        "recipe.yml, average.yml, from_parent.yml": "the recipes",
        "data/": "the bundled rows; the package's NOTICE names their authors and licences",
        "pretrained/, parent/, models/": "the parent, twice; the fine-tuned models, each with its sidecar in fisher/",
        "merged/": "what mergekit wrote",
        "tasks/": "a complete checkpoint per merge and task",
    }
    width = max(len(name) for name in places)
    return f"In {out}:\n" + "\n".join(f"    {name:<{width}}  {what}" for name, what in places.items())
