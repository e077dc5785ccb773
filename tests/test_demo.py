"""The demo, at a scale where nothing is learnt: what it writes and says, not how good it is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fisher_mask_mergekit.demo import commands, run_demo, story
from fisher_mask_mergekit.demo.sizes import Sizes
from fisher_mask_mergekit.demo.story import TASKS
from fisher_mask_mergekit.demo.training import train_tokenizer
from fisher_mask_mergekit.errors import FisherMaskError, RecipeError
from tests import commands as quick_commands

pytestmark = pytest.mark.xdist_group("demo")  # What they share is made once.
TINY = Sizes(
    vocabulary=300,
    layers=2,
    hidden=32,
    heads=2,
    neurons=64,
    max_length=16,
    pretraining_epochs=1,
    fine_tuning_epochs=3,
    fine_tuning_rate=3e-3,
    train_rows=192,
    held_out_rows=120,
)
MERGES = ("average", "fisher_mask", "from_parent")
LABELS = {"banking77": 20, "clinc150": 30}


@dataclass(frozen=True)
class Told:
    out: Path
    lines: list[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("work") / "demo"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # Tensors this small gain nothing, and busy neighbours make threads wait.

    def forked(command: list[str], *, env: dict[str, str], **_: object) -> "subprocess.CompletedProcess[str]":
        return quick_commands.run([Path(command[0]).name, *command[1:]], env=env, cwd=Path.cwd())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "subprocess", SimpleNamespace(run=forked))
        # The cache of each test is set up after what tests share.
        patch.setenv("FISHER_MASK_CACHE", str(out.parent / "cache"))
        run_demo(out, lines.append, TINY)
    torch.set_num_threads(threads)
    torch.testing.assert_close(torch.get_rng_state(), state)
    return Told(out, lines)


def test_says_the_commands_it_runs(told: Told) -> None:
    text = "\n".join(told.lines)
    for command in (
        "mergekit-fisher init",
        "mergekit-fisher compute",
        "mergekit-fisher check",
        "mergekit-fisher inspect",
        "mergekit-yaml",
        "mergekit-fisher heads",
        "mergekit-fisher evaluate",
    ):
        assert f"$ {command} {told.out}" in text
    for name in ("banking77", "clinc150"):
        assert f"{told.out / 'models' / name}: 128 samples, accuracy" in text


def test_printed_commands_write_the_recipes(told: Told, tmp_path: Path) -> None:
    written = [line.strip() for line in told.lines if " > " in line]
    assert len(written) == 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in written:
        command = line.removeprefix("$ ").replace(f" > {told.out}/", f" > {tmp_path}/")
        subprocess.run(["sh", "-c", command], env=os.environ | {"PATH": path}, check=True)
    assert sorted(file.name for file in tmp_path.glob("*.yml")) == sorted(
        file.name for file in told.out.glob("*.yml")
    )
    for file in tmp_path.glob("*.yml"):
        assert file.read_text() == (told.out / file.name).read_text()


def test_scores_are_shown_and_written(told: Told) -> None:
    record = json.loads((told.out / "results.json").read_text())
    assert record["merges"] == list(MERGES)
    assert [(one["merge"], one["minus"]) for one in record["differences"]] == [
        ("fisher_mask", "average"),
        ("from_parent", "average"),
    ]
    assert [(task["task"], task["rows"], task["data"]) for task in record["tasks"]] == [
        (task, 120, str(told.out / "data" / f"{task}_held_out.jsonl")) for task in TASKS
    ]
    assert (told.out / "results.md").read_text() in "\n".join(told.lines)


def test_written_accuracies_are_the_checkpoints_own(told: Told) -> None:
    """Found here with transformers alone, of the checkpoint that a user would take for a task."""
    record = json.loads((told.out / "results.json").read_text())
    folders = {"fine-tuned": "models"} | {merge: f"tasks/{merge}" for merge in MERGES}
    for task in record["tasks"]:
        rows = (told.out / "data" / f"{task['task']}_held_out.jsonl").read_text().splitlines()
        held_out = [json.loads(row) for row in rows]
        for line, folder in folders.items():
            found = accuracy(told.out / folder / task["task"], held_out)
            assert task["scores"]["accuracy"][line]["value"] == pytest.approx(found), (task["task"], line)


def accuracy(folder: Path, rows: list[dict[str, str]]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in rows]
    inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**inputs).logits.argmax(-1).tolist()
    names = [model.config.id2label[index] for index in found]
    return sum(name == row["label"] for name, row in zip(names, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("task", TASKS)
def test_checkpoint_per_task_loads_complete(told: Told, merge: str, task: str) -> None:
    folder = told.out / "tasks" / merge / task
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.classifier.out_features == LABELS[task]
    own = AutoModelForSequenceClassification.from_pretrained(told.out / "models" / task)
    assert model.config.label2id == own.config.label2id
    torch.testing.assert_close(model.classifier.weight, own.classifier.weight, rtol=0, atol=0)
    texts = ["How old do I have to BE?"]
    expected = AutoTokenizer.from_pretrained(told.out / "models" / task)(texts)
    assert dict(AutoTokenizer.from_pretrained(folder)(texts)) == dict(expected)


def test_merges_are_what_they_are_called(told: Told) -> None:
    """Queries are averaged in one and weighted in the other; values are averaged in both."""
    from safetensors.torch import load_file

    own = [load_file(told.out / "models" / task / "model.safetensors") for task in TASKS]
    merges = {
        name: load_file(told.out / "tasks" / name / TASKS[0] / "model.safetensors")
        for name in ("average", "fisher_mask")
    }
    for kind in ("query", "value"):
        name = f"bert.encoder.layer.1.attention.self.{kind}.weight"
        mean = (own[0][name] + own[1][name]) / 2
        torch.testing.assert_close(merges["average"][name], mean)
        assert (merges["fisher_mask"][name] - mean).abs().max() < 1e-6 or kind == "query"
        if kind == "query":
            assert (merges["fisher_mask"][name] - mean).abs().max() > 1e-4


def test_every_place_it_names_is_there(told: Told) -> None:
    places = next(line for line in told.lines if line.startswith(f"In {told.out}:"))
    names = [
        name.strip() for row in places.splitlines()[1:] for name in row.strip().split("  ")[0].split(",")
    ]
    assert len(names) >= 10
    for name in names:
        assert (told.out / name).exists(), name
    assert (told.out / "fisher.png").read_bytes().startswith(b"\x89PNG")
    for page in ("report.html", "fisher.html"):
        assert (told.out / page).read_text().count('class="model"') == 2
    assert not list(told.out.rglob(".*")), "a temporary file was left"


def test_tokenizer_is_the_same_every_time() -> None:
    texts = [f"Where is the card number {index}, please? I've waited {index} days." for index in range(50)]
    first, second = (train_tokenizer(texts, TINY) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.tokenize("the CARD!") == ["the", "card", "[UNK]"]


def test_import_is_light() -> None:
    """What must be set before torch is loaded can still be set."""
    heavy = ("torch", "transformers", "matplotlib", "mergekit")
    code = f"import sys, fisher_mask_mergekit.demo; print([name for name in {heavy} if name in sys.modules])"
    assert commands.run_command([sys.executable, "-c", code]).strip() == "[]"


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(RecipeError, match="exists; remove it, or choose another folder"):
        run_demo(tmp_path, print, TINY)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot make .*file/demo"):
        run_demo(tmp_path / "file" / "demo", print, TINY)


def test_failed_command_is_one_error_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "_train", lambda *_: None)
    monkeypatch.setattr(story, "_draft", lambda *_: None)
    with pytest.raises(FisherMaskError, match=r"(?s)compute .* failed with exit code 1:.*cannot read recipe"):
        run_demo(tmp_path / "demo", lambda _: None, TINY)
    assert not list(tmp_path.iterdir())


def test_command_that_is_nowhere() -> None:
    with pytest.raises(FisherMaskError, match="there is no command no-such-command"):
        commands.run_command(["no-such-command"])


def test_bundled_data_is_small_and_labelled_by_name() -> None:
    folder = resources.files("fisher_mask_mergekit.demo") / "data"
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sorted(content) == sorted(
        f"{task}_{part}.jsonl" for task in TASKS for part in ("train", "held_out")
    )
    assert sum(map(len, content.values())) < 500_000
    for task in TASKS:
        rows = {
            part: [json.loads(line) for line in content[f"{task}_{part}.jsonl"].splitlines()]
            for part in ("train", "held_out")
        }
        names = {part: {row["label"] for row in found} for part, found in rows.items()}
        assert all(isinstance(name, str) and not name.isdigit() for name in names["train"])
        assert names["train"] == names["held_out"]
        assert len(names["train"]) == LABELS[task]
        assert not {row["text"] for row in rows["train"]} & {row["text"] for row in rows["held_out"]}
