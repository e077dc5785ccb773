"""The demo, at a scale where nothing is learnt: what it writes and says, not how good it is."""

import json
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy
import pytest
import torch

from fisher_mask_mergekit.demo import commands, run_demo, story
from fisher_mask_mergekit.demo.results import AVERAGE, MERGED, NORMALIZED, OWN, Results
from fisher_mask_mergekit.demo.sizes import Sizes
from fisher_mask_mergekit.demo.story import TASKS
from fisher_mask_mergekit.demo.training import Rows, correct, train_tokenizer
from fisher_mask_mergekit.errors import FisherMaskError, MeasurementError, RecipeError

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
    run_demo(out, lines.append, TINY)
    torch.set_num_threads(threads)
    torch.testing.assert_close(torch.get_rng_state(), state)
    return Told(out, lines)


def test_says_the_commands_it_runs(told: Told) -> None:
    text = "\n".join(told.lines)
    for command in (
        "mergekit-fisher init",
        "mergekit-fisher compute",
        "mergekit-yaml",
        "mergekit-fisher heads",
    ):
        assert f"$ {command} {told.out}" in text
    for name in ("banking77", "clinc150"):
        assert f"{told.out / 'models' / name}: 128 samples, accuracy" in text


def test_table_is_shown_and_written(told: Told) -> None:
    record = json.loads((told.out / "results.json").read_text())
    markdown = (told.out / "results.md").read_text()
    assert list(record["accuracy"]) == [OWN, AVERAGE, MERGED, NORMALIZED]
    assert record["held_out_rows"] == {"banking77": 120, "clinc150": 120}
    assert record["normalised_mean"][OWN] == {"value": pytest.approx(100), "error": pytest.approx(0)}
    for line, accuracies in record["accuracy"].items():
        row = next(row for row in markdown.splitlines() if row.startswith(f"| {line} "))
        assert row in "\n".join(told.lines)
        for task in TASKS:
            assert f"{accuracies[task]['value']:.3f} ± {accuracies[task]['error']:.3f}" in row
    assert "Held-out rows: 120 of banking77, 120 of clinc150" in markdown


def test_written_accuracies_are_the_checkpoints_own(told: Told) -> None:
    record = json.loads((told.out / "results.json").read_text())
    folders = ("models", "tasks/average", "tasks/fisher_mask", "tasks/normalized")
    for line, folder in zip((OWN, AVERAGE, MERGED, NORMALIZED), folders, strict=True):
        for task in TASKS:
            rows = [
                json.loads(row)
                for row in (told.out / "data" / f"{task}_held_out.jsonl").read_text().splitlines()
            ]
            held_out = Rows(tuple(row["text"] for row in rows), tuple(row["label"] for row in rows))
            found = correct(told.out / folder / task, held_out).mean()
            assert found == pytest.approx(record["accuracy"][line][task]["value"])


@pytest.mark.parametrize("merge", ["average", "fisher_mask", "normalized"])
@pytest.mark.parametrize("task", TASKS)
def test_checkpoint_per_task_loads_complete(told: Told, merge: str, task: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

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
        for name in (AVERAGE, MERGED)
    }
    for kind in ("query", "value"):
        name = f"bert.encoder.layer.1.attention.self.{kind}.weight"
        mean = (own[0][name] + own[1][name]) / 2
        torch.testing.assert_close(merges[AVERAGE][name], mean)
        assert (merges[MERGED][name] - mean).abs().max() < 1e-6 or kind == "query"
        if kind == "query":
            assert (merges[MERGED][name] - mean).abs().max() > 1e-4


def test_every_place_it_names_is_there(told: Told) -> None:
    places = next(line for line in told.lines if line.startswith(f"In {told.out}:"))
    names = [
        name.strip() for row in places.splitlines()[1:] for name in row.strip().split("  ")[0].split(",")
    ]
    assert len(names) >= 10
    for name in names:
        assert (told.out / name).exists(), name
    assert (told.out / "fisher.png").read_bytes().startswith(b"\x89PNG")
    assert (told.out / "report.html").read_text().count('class="model"') == 2
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


def _results(seed: int, rows: int = 400) -> Results:
    generator = numpy.random.default_rng(seed)
    own, average = generator.random(rows) < 0.9, generator.random(rows) < 0.6
    better = average | (generator.random(rows) < 0.1)
    return Results(
        {
            OWN: {"a": own, "b": own},
            AVERAGE: {"a": average, "b": ~own},
            MERGED: {"a": better, "b": ~own},
            NORMALIZED: {"a": average, "b": ~own},
        }
    )


@pytest.mark.parametrize(("line", "minus"), [(OWN, None), (AVERAGE, None), (MERGED, None), (MERGED, AVERAGE)])
def test_standard_error_is_that_of_redrawn_rows(line: str, minus: str | None) -> None:
    results = _results(0)
    generator = numpy.random.default_rng(1)
    values = []
    for _ in range(1000):
        drawn = {task: generator.integers(400, size=400) for task in "ab"}
        redrawn = Results(
            {
                name: {task: rows[drawn[task]] for task, rows in of.items()}
                for name, of in results.correct.items()
            }
        )
        values.append(redrawn.normalised_mean(line, minus).value)
    assert results.normalised_mean(line, minus).error == pytest.approx(numpy.std(values), rel=0.1, abs=1e-9)


def test_normalised_mean_by_hand() -> None:
    def rows(right: int) -> numpy.ndarray:
        return numpy.arange(10) < right

    results = Results(
        {
            OWN: {"a": rows(8), "b": rows(5)},
            AVERAGE: {"a": rows(4), "b": rows(5)},
            MERGED: {"a": rows(6), "b": rows(4)},
        }
    )
    assert results.normalised_mean(AVERAGE).value == pytest.approx(75)
    assert results.normalised_mean(MERGED).value == pytest.approx((75 + 80) / 2)
    assert results.normalised_mean(MERGED, AVERAGE).value == pytest.approx(2.5)
    assert results.accuracy(OWN, "a").error == pytest.approx((0.8 * 0.2 / 10) ** 0.5)


def test_noise_is_not_called_a_gain() -> None:
    results = _results(0)
    first, second = (line for line in results.caution().splitlines() if "minus average" in line)
    assert first.startswith(f"{MERGED} minus")
    assert "beyond two standard errors" in first
    assert second.startswith(f"{NORMALIZED} minus")
    assert "cannot tell the two merges apart" in second


def test_model_that_is_never_right() -> None:
    never = {"a": numpy.zeros(5, bool)}
    with pytest.raises(MeasurementError, match="fine-tuned on a is right on none of 5 rows"):
        Results({OWN: never, AVERAGE: never, MERGED: never}).normalised_mean(AVERAGE)
