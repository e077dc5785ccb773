"""Measuring without labels: on text alone, and on random tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.data import RANDOM_TOKENS, load_samples
from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import Outcome, compute
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar
from fisher_mask_mergekit.tasks import MaskedLM, SequenceClassification, TokenClassification
from fisher_mask_mergekit.tasks.likelihood import Categorical, Gaussian
from tests import tiny, tiny_tasks
from tests.test_cli import run

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
        load_samples(
            FisherSettings(data=str(data), **given), SequenceClassification(label2id={"a": 0, "b": 1})
        )


def test_random_tokens_are_the_vocabularys_and_the_seeds() -> None:
    task, tokenizer = SequenceClassification(label2id={"a": 0, "b": 1}), tiny.tokenizer()

    def drawn(samples: int, seed: int) -> list[tuple[Any, ...]]:
        request = FisherSettings(data="random", labels="sampled", samples=samples, seed=seed)
        return load_samples(request, task, tokenizer=tokenizer).texts

    few = drawn(5, 0)
    assert few == drawn(8, 0)[:5]
    assert len(set(few) | set(drawn(5, 1))) == 10
    words = [word for (text,) in few for word in text.split()]
    assert len(words) == 5 * RANDOM_TOKENS
    assert {int(word.removeprefix("w")) for word in words} <= set(range(5, tiny.VOCABULARY))
    assert len(set(words)) > 50


@pytest.mark.parametrize("name", ["gpt2-causal", "bert-masked"])
def test_language_models_are_measured_on_random_tokens(tmp_path: Path, name: str) -> None:
    folder = tiny.save(tiny_tasks.model(name).float(), tmp_path / "model")
    _, found = measured(folder, "random", tmp_path / "a.safetensors", labels="sampled", max_length=16)
    assert found.metadata.samples == 6
    assert all(value.isfinite().all() for nodes in found.fisher.values() for value in nodes.values())


def test_a_sidecar_of_random_tokens_is_served_verified_and_reproduced(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    options = ["--data", "random", "--labels", "sampled", "--samples", "6"]
    assert "6 samples, loss" in (first := run("compute", folder, *options).stdout), first
    assert "measured before" in run("compute", folder, *options).stdout
    sidecar = folder / "fisher" / "mask_fisher.safetensors"
    assert "data" in run("verify", sidecar, "--model", folder, "--recompute", "6").stdout
    shown = run("inspect", sidecar).stdout
    assert "--data random" in shown


def test_a_folder_called_random_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "data.jsonl")
    run_folder = tmp_path / "random"
    run_folder.mkdir()
    (tmp_path / "data.jsonl").rename(run_folder / "data.jsonl")
    drawn = load_samples(
        FisherSettings(data="./random", samples=3), SequenceClassification(label2id={"a": 0, "b": 1})
    )
    assert len(drawn.texts) == 3


def test_random_tokens_are_refused_where_they_say_nothing(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    assert (
        "has no labels; take labels sampled, or exact"
        in run("compute", folder, "--data", "random", code=1).output
    )
    with pytest.raises(DataError, match="nothing in them to score"):
        load_samples(
            FisherSettings(data="random", labels="sampled"), SequenceClassification(label2id={"a": 0})
        )
    tags = FisherSettings(data="random", labels="sampled")
    with pytest.raises(DataError, match="no text column found in 'random'"):
        load_samples(tags, TokenClassification(label2id={"O": 0}), tokenizer=tiny.tokenizer())
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher_mask\nmodels: [{{model: {folder}}}]\nfisher: {{data: random, labels: sampled}}\n"
    )
    assert (
        "data 'random' is to measure on; say what to evaluate on"
        in run("evaluate", recipe, folder, code=1).output
    )


def test_a_tokenizer_without_tokens_is_one_error() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"w{index}" for index in range(5, tiny.VOCABULARY)]}
    )
    request = FisherSettings(data="random", labels="sampled")
    with pytest.raises(DataError, match="no tokens but special ones"):
        load_samples(request, MaskedLM(), tokenizer=tokenizer)
