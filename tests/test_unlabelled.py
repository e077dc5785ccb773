"""Measuring without labels: on text alone, and on random tokens."""

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import AddedToken
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from fisher_mask_mergekit import random_text
from fisher_mask_mergekit.data import load_samples, parse_spec
from fisher_mask_mergekit.errors import DataError, MeasurementError
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import Outcome, compute
from fisher_mask_mergekit.random_text import TOKENS, Vocabulary
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sharing.public_metadata import public
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from fisher_mask_mergekit.tasks import SequenceClassification, TokenClassification
from fisher_mask_mergekit.tasks.likelihood import Categorical, Gaussian
from tests import tiny, tiny_tasks
from tests.test_cli import run

CLASSES = SequenceClassification(label2id={"a": 0, "b": 1})
WORDS = [{"text": f"w{5 + row} w{9 + 2 * row} w{40 - row}"} for row in range(9)]
LABELS: dict[str, list[Any]] = {
    "single_label_classification": [row % 2 for row in range(9)],
    "multi_label_classification": [[row % 2, row // 2 % 2] for row in range(9)],
    "regression": [[row / 9, 1.0] for row in range(9)],
}


def measured(model: Path, data: Path | str, out: Path, **settings: Any) -> tuple[Outcome, Sidecar]:
    request = FisherSettings(data=str(data), samples=6, dtype="float64", **settings)
    done = compute(prepare(str(model), request, out=out), torch.device("cpu"))
    assert isinstance(done.sidecar, Sidecar)
    return done, done.sidecar


@pytest.mark.parametrize(
    ("problem", "labels"),
    [*((problem, "sampled") for problem in LABELS), ("single_label_classification", "exact")],
)
def test_what_the_model_is_asked_for_needs_no_labels(tmp_path: Path, problem: str, labels: str) -> None:
    model = tiny.save(tiny.classifier("bert", 2, problem_type=problem), tmp_path / "model")
    with_labels, without = tmp_path / "labelled.jsonl", tmp_path / "text.jsonl"
    rows = [row | {"label": label} for row, label in zip(WORDS, LABELS[problem], strict=True)]
    for path, lines in ((with_labels, rows), (without, WORDS)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, known = measured(model, with_labels, tmp_path / "a.safetensors", labels=labels)
    _, blank = measured(model, without, tmp_path / "b.safetensors", labels=labels)
    assert known.metadata.data.label == "label"
    assert blank.metadata.data.label is None
    assert blank.metadata.accuracy is None
    for output, nodes in known.fisher.items():
        for node, value in nodes.items():
            assert torch.equal(value, blank.fisher[output][node]), (output, node)
    if problem == "regression":  # Of a Gaussian of variance 1, half the square's mean.
        assert blank.metadata.loss == 0.5
    else:
        assert 0 < blank.metadata.loss <= math.log(2)
    again, _ = measured(model, without, tmp_path / "b.safetensors", labels=labels)
    assert again.served


def test_the_loss_without_a_label_is_the_mean_over_the_models_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64)
    targets, owner = torch.tensor([1, -100, -100, 2]), torch.tensor([0, 0, 1, 1])
    likelihood = Categorical.of(logits, targets, owner, "mean", (0, 1))
    terms = [
        -logits.log_softmax(1)[row, target] if target >= 0 else torch.distributions.Categorical(logits=logits[row]).entropy()
        for row, target in enumerate(targets.tolist())
    ]  # fmt: skip
    assert_close(likelihood.losses(), torch.stack([(terms[0] + terms[1]) / 2, (terms[2] + terms[3]) / 2]))
    assert likelihood.correct().isnan().all()
    outcomes = torch.tensor([0, 1, 2, 0])
    assert_close(
        likelihood.losses(outcomes), Categorical.of(logits, outcomes, owner, "mean", (0, 1)).losses()
    )
    means = torch.randn(2, 3, dtype=torch.float64)
    blank = Gaussian(means, torch.full_like(means, math.nan), 1 / 3, (0, 1))
    assert_close(blank.losses(), torch.full((2,), 0.5, dtype=torch.float64))
    assert_close(blank.losses(means + 1), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("given", [{}, {"labels": "data"}, {"labels": "sampled", "label": "label"}])
def test_labels_that_are_wanted_must_be_there(tmp_path: Path, given: dict[str, Any]) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in WORDS))
    remedy = "has no column 'label'" if "label" in given else r"no label column found .* labels: sampled"
    with pytest.raises(DataError, match=remedy):
        load_samples(FisherSettings(data=str(data), **given), CLASSES)


@pytest.mark.parametrize("blank", [-1, None])
@pytest.mark.parametrize("problem", ["single_label_classification", "regression"])
def test_a_label_column_that_says_nothing_is_none(tmp_path: Path, problem: str, blank: Any) -> None:
    model = tiny.save(tiny.classifier("bert", 2, problem_type=problem), tmp_path / "model")
    blanks, without = tmp_path / "blank.jsonl", tmp_path / "text.jsonl"
    blanks.write_text("".join(json.dumps(row | {"label": blank}) + "\n" for row in WORDS))
    without.write_text("".join(json.dumps(row) + "\n" for row in WORDS))
    _, one = measured(model, blanks, tmp_path / "a.safetensors", labels="sampled")
    _, other = measured(model, without, tmp_path / "b.safetensors", labels="sampled")
    assert one.metadata.data == other.metadata.data
    assert one.metadata.loss == other.metadata.loss
    # Where some rows have one, the others' are missing.
    blanks.write_text(blanks.read_text() + json.dumps({"text": "w5", "label": 1}) + "\n")
    with pytest.raises(DataError):
        prepare(str(model), FisherSettings(data=str(blanks), labels="sampled"))


def test_what_names_labels_wants_a_column_of_them(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in WORDS))
    with pytest.raises(DataError, match="no label column found"):
        load_samples(FisherSettings(data=str(data), labels="sampled", label_map={"x": 0}), CLASSES)


def random_texts(samples: int, seed: int, tokenizer: Any = None, rows: int = tiny.VOCABULARY) -> list[Any]:
    request = FisherSettings(data="random", labels="sampled", samples=samples, seed=seed)
    return load_samples(request, CLASSES, vocabulary=Vocabulary(tokenizer or tiny.tokenizer(), rows)).texts


def words(drawn: list[Any]) -> list[str]:
    return [word for (text,) in drawn for word in text.split()]


def numbers(drawn: list[Any]) -> set[int]:
    return {int(word.removeprefix("w")) for word in words(drawn)}


def test_random_tokens_are_the_vocabularys_and_the_seeds() -> None:
    few = random_texts(5, 0)
    assert few == random_texts(8, 0)[:5]
    assert len(set(few) | set(random_texts(5, 1))) == 10
    assert len(words(few)) == 5 * TOKENS
    assert numbers(random_texts(20, 0)) == set(range(5, tiny.VOCABULARY))


def test_random_tokens_say_nothing_of_the_labels_that_are_drawn() -> None:
    """The model's labels are drawn by seed and index too."""
    places = numpy.array([[int(word[1:]) for word in text.split()] for (text,) in random_texts(200, 3)])
    drawn = numpy.array([numpy.random.default_rng([3, index]).random() for index in range(200)])
    related = numpy.corrcoef(numpy.column_stack([drawn, places]), rowvar=False)[0, 1:]
    assert len(related) == TOKENS
    assert abs(related).max() < 0.35


def test_tokens_that_the_model_does_not_know_or_that_are_special_are_not_drawn() -> None:
    assert numbers(random_texts(20, 0, rows=20)) == set(range(5, 20))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(f"<r{index}>", special=True) for index in range(60)])
    assert tokenizer.convert_tokens_to_ids("<r7>") not in tokenizer.all_special_ids
    assert numbers(random_texts(20, 0, tokenizer, 200)) == set(range(5, tiny.VOCABULARY))
    with pytest.raises(DataError, match="no tokens but special ones"):
        random_texts(1, 0, tokenizer, 5)


def test_random_texts_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_text, "MOST_TEXTS", 2000)
    assert len(random_texts(2000, 0)) == 2000
    with pytest.raises(
        DataError, match=r"data 'random': 2,001 samples are asked for; no more than 2,000 texts are"
    ):
        random_texts(2001, 0)


@pytest.mark.parametrize("name", ["gpt2-causal", "bert-masked"])
def test_language_models_are_measured_on_random_tokens(tmp_path: Path, name: str) -> None:
    folder = tiny.save(tiny_tasks.model(name).float(), tmp_path / "model")
    _, found = measured(folder, "random", tmp_path / "a.safetensors", labels="sampled", max_length=16)
    assert found.metadata.samples == 6
    assert all(
        value.isfinite().all() and value.sum() > 0
        for nodes in found.fisher.values()
        for value in nodes.values()
    )


@pytest.mark.parametrize("kind", ["factored", "diagonal"])
def test_every_kind_is_measured_without_labels(tmp_path: Path, kind: Any) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    request = FisherSettings(data="random", samples=4, labels="sampled", kind=kind)
    done = compute(prepare(str(folder), request, out=tmp_path / "out"), torch.device("cpu"))
    assert (done.sidecar.metadata.samples, done.sidecar.metadata.accuracy) == (4, None)


def test_a_sidecar_of_random_tokens_is_served_verified_and_reproduced(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    options = ["--data", "random", "--labels", "sampled", "--samples", "6", "--max-length", "16"]
    done = run("compute", folder, *options)
    assert "6 samples, loss" in done.stdout
    assert "truncated" not in done.output
    assert "measured before" in run("compute", folder, *options).stdout
    sidecar = folder / "fisher" / "mask_fisher.safetensors"
    verify: list[Any] = ["verify", sidecar, "--model", folder, "--recompute", "6"]
    assert "ok: numbers: " in run(*verify).stdout
    shown = run("inspect", sidecar).stdout
    assert "data        random tokens\n" in shown
    assert "--data random" in shown
    reordered_vocabulary(folder / "tokenizer.json")
    refused = run(*verify, code=1).output
    assert "the random tokens are not those that were measured" in refused
    assert "The checkpoint's tokenizer is another" in refused


def reordered_vocabulary(path: Path) -> None:
    """Another tokenizer in place of a checkpoint's."""
    known = json.loads(path.read_text())
    names = known["model"]["vocab"]
    names["w5"], names["w6"] = names["w6"], names["w5"]
    path.write_text(json.dumps(known))
    assert PreTrainedTokenizerFast(tokenizer_file=str(path)).decode([5]) == "w6"


def test_a_folder_called_random_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("random").mkdir()
    tiny.write_data(Path("random", "data.jsonl"))
    assert len(load_samples(FisherSettings(data="./random", samples=3), CLASSES).texts) == 3


def test_published_a_folder_called_random_stays_a_folder(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    (tmp_path / "random").mkdir()
    data = tiny.write_data(tmp_path / "random" / "data.jsonl").parent
    _, known = measured(folder, data, tmp_path / "a.safetensors")
    changed, notes = public(known, "me/repo", "a" * 40)
    assert any("is called './random'" in note for note in notes)
    write(changed, tmp_path / "b.safetensors")
    assert read(tmp_path / "b.safetensors").metadata.settings.data == "./random"
    _, drawn = measured(folder, "random", tmp_path / "c.safetensors", labels="sampled")
    assert public(drawn, "me/repo", "a" * 40)[0].metadata.settings.data == "random"


def test_shares_of_random_tokens_add_up_to_the_whole(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    _, whole = measured(folder, "random", tmp_path / "whole.safetensors", labels="sampled")
    parts = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        measured(folder, "random", part, labels="sampled", share=f"{number}/2")
    run("combine", *parts, "--out", tmp_path / "sum.safetensors")
    added = read(tmp_path / "sum.safetensors")
    assert (added.metadata.samples, added.metadata.accuracy) == (6, None)
    assert added.metadata.loss == pytest.approx(whole.metadata.loss)
    for output, nodes in whole.fisher.items():
        for node, value in nodes.items():
            assert_close(added.fisher[output][node], value, rtol=1e-6, atol=0)


def test_random_tokens_are_refused_where_they_say_nothing(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    out = run("compute", folder, "--data", "random", code=1).output
    assert "has no labels; take labels sampled, or exact" in out
    out = run("compute", folder, "--data", "random", "--labels", "sampled", "--text", "text", code=1).output
    assert "random tokens and has no columns; remove text" in out
    for name in ("random:", "random@main", "random:a:b"):
        with pytest.raises(DataError, match="'random' has no configuration, split or revision"):
            parse_spec(name)
    request = FisherSettings(data="random", labels="sampled")
    with pytest.raises(DataError, match="nothing in them to score"):
        load_samples(request, CLASSES)
    with pytest.raises(DataError, match="masked-lm, causal-lm; the task is token-classification"):
        load_samples(request, TokenClassification(), vocabulary=Vocabulary(tiny.tokenizer(), 64))
    other = tiny.sibling(tmp_path / "other", folder, seed=1)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher_mask\nmodels: [{{model: {folder}}}, {{model: {other}}}]\n"
        "fisher: {data: random, labels: sampled}\n"
    )
    out = run("evaluate", recipe, folder, code=1).output
    assert "data 'random' is to measure on; say what to evaluate on" in out
    out = run("tune", recipe, tmp_path / "out", code=1).output
    assert (
        "has data 'random', of which tune can hold nothing back; name what it was trained on as data" in out
    )
    recipe.write_text(recipe.read_text().replace("sampled", "sampled, eval: random"))
    commands: list[list[Any]] = [["evaluate", recipe, folder], ["check", recipe]]
    for command in commands:
        assert "there is nothing in them to score a model on" in run(*command, code=1).output


def test_a_models_own_infinities_are_still_its_own(tmp_path: Path) -> None:
    broken = tiny.classifier("bert", 2, problem_type="regression")
    with torch.no_grad():
        broken.get_parameter("classifier.weight").fill_(torch.nan)
    folder = tiny.save(broken, tmp_path / "model")
    with pytest.raises(MeasurementError, match="the loss of sample 0 is nan"):
        measured(folder, "random", tmp_path / "a.safetensors", labels="sampled")
