"""The demo step by step, with the commands a user would type."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import locate
from fisher_mask_mergekit.demo.commands import run_command, spell
from fisher_mask_mergekit.demo.results import AVERAGE, MERGED, NORMALIZED, OWN, Results
from fisher_mask_mergekit.demo.sizes import SEED, Sizes
from fisher_mask_mergekit.demo.training import Rows, correct, fine_tune, pretrain, train_tokenizer
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.pages.fisher_pictures import head_fisher_map
from fisher_mask_mergekit.pages.inspect_page import recipe_page
from fisher_mask_mergekit.preview.inspection import recipe_shares
from fisher_mask_mergekit.recipe import METHOD, read_recipe
from fisher_mask_mergekit.sidecar import read
from fisher_mask_mergekit.store import write_result

TASKS = ("banking77", "clinc150")
_MERGES = {AVERAGE: "average", MERGED: "fisher_mask", NORMALIZED: "normalized"}
_RECIPES = {"average": "average.yml", "fisher_mask": "recipe.yml", "normalized": "normalized.yml"}
_ALIKE = "parameters: {normalize: model}"
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
    say(f"[1/7] Two tasks of real text: {counts}.")
    _train(out, tasks, say, sizes)
    _draft(out, say)
    say("[4/7] Measure the Fisher information of both models' mask nodes, and see whether the merge will do.")
    for name in ("compute", "check"):
        command = ["mergekit-fisher", name, str(out / "recipe.yml")]
        say(spell(command))
        for line in run_command(command).splitlines():
            say(f"    {line}")
    _merge(out, say)
    say("[6/7] Evaluate on the held-out rows.")
    lines = {OWN: "models"} | {line: f"tasks/{name}" for line, name in _MERGES.items()}
    results = Results(
        {
            line: {task.name: correct(out / folder / task.name, task.held_out) for task in tasks}
            for line, folder in lines.items()
        }
    )
    say("[7/7] Draw what was measured, write the table.")
    _write(out, results, sizes)
    say(f"\n{results.table()}\n\n{results.caution()}\n")
    say(_where(out))
    say(f"Done in {time.perf_counter() - started:.0f} s.")


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
        f"[2/7] Make a BERT of {sizes.layers} layers with {sizes.heads} heads and {sizes.neurons} neurons each: "
        "masked-LM training on both tasks' training texts, then fine-tuning on each task."
    )
    texts = [text for task in tasks for text in task.train.texts]
    parent = out / "pretrained"
    tokenizer = train_tokenizer(texts, sizes)
    started = time.perf_counter()
    first, last = pretrain(texts, tokenizer, sizes, parent)
    say(f"    {parent}: masked-LM loss {first:.2f} to {last:.2f}, {time.perf_counter() - started:.0f} s")
    for task in tasks:
        folder = out / "models" / task.name
        started = time.perf_counter()
        fine_tune(task.train, task.labels, parent, sizes, folder)
        say(f"    {folder}: {len(task.labels)} labels, {time.perf_counter() - started:.0f} s")


def _draft(out: Path, say: Say) -> None:
    """The recipe, the same one for plain averaging, and one that lets each model count alike."""
    models = [str(out / "models" / name) for name in TASKS]
    data = [str(out / "data" / f"{name}_train.jsonl") for name in TASKS]
    options = [word for file in data for word in ("--data", file)]
    recipe, average, normalized = (out / _RECIPES[name] for name in ("fisher_mask", "average", "normalized"))
    method, plain = f"merge_method: {METHOD}", "merge_method: linear"
    say(
        "[3/7] Write the recipe, a second one that only averages, and a third that lets each model count alike."
    )
    say(spell(["mergekit-fisher", "init", *models, *options], to=recipe))
    say(spell(["sed", f"s/{method}/{plain}/", str(recipe)], to=average))
    say(spell(["sed", f"$a {_ALIKE}", str(recipe)], to=normalized))
    text = draft_recipe(models, data)
    recipe.write_text(text, encoding="utf-8")
    average.write_text(text.replace(method, plain), encoding="utf-8")
    normalized.write_text(f"{text}{_ALIKE}\n", encoding="utf-8")


def _merge(out: Path, say: Say) -> None:
    say("[5/7] Merge with each recipe; give each task its own head on the merged encoder.")
    for name, recipe in _RECIPES.items():
        merged = str(out / "merged" / name)
        for command in (
            ["mergekit-yaml", str(out / recipe), merged],
            ["mergekit-fisher", "heads", str(out / recipe), merged, str(out / "tasks" / name)],
        ):
            say(spell(command))
            run_command(command)


def _write(out: Path, results: Results, sizes: Sizes) -> None:
    """The pictures, and the table for people and for programs."""
    sidecars = {}
    for name in TASKS:
        path = store.find(locate(str(out / "models" / name)))
        assert path is not None, "compute has just written it"
        sidecars[name] = read(path)
    head_fisher_map(sidecars, out / "fisher.png")
    page = recipe_page("recipe.yml", *recipe_shares(read_recipe(out / "recipe.yml")))
    write_result(out / "report.html", page.encode())
    record = {
        **results.record(),
        "seed": SEED,
        "sizes": asdict(sizes),
        "versions": {name: version(name) for name in ("mergekit", "torch", "transformers")},
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "results.md").write_text(
        f"# Two tasks, one encoder\n\n{results.table()}\n\n{results.caution()}\n\n"
        "![Fisher information of the mask nodes](fisher.png)\n",
        encoding="utf-8",
    )


def _where(out: Path) -> str:
    places: Mapping[str, str] = {
        "results.md, results.json": "the table",
        "report.html": "a page with each model's Fisher information and its share of every layer",
        "fisher.png": "the Fisher information of each model's mask nodes",
        "recipe.yml, average.yml, normalized.yml": "the recipes",
        "data/": "the bundled rows; the package's NOTICE names their authors and licences",
        "pretrained/, models/": "the parent; the fine-tuned models, each with its sidecar in fisher/",
        "merged/": "what mergekit wrote",
        "tasks/": "a complete checkpoint per merge and task",
    }
    width = max(len(name) for name in places)
    return f"In {out}:\n" + "\n".join(f"    {name:<{width}}  {what}" for name, what in places.items())
