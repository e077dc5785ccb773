"""Tasks of lm-evaluation-harness, with a stand-in for the harness: it is no requirement."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fisher_mask_mergekit.evaluation.scores import OWN
from tests import tiny
from tests.test_cli import run
from tests.test_evaluate import pair, refused

SAMPLES = 6


class Harness(ModuleType):
    """Answers like version 0.4.13, by the model's folder."""

    def __init__(self) -> None:
        super().__init__("lm_eval")
        self.calls: list[dict[str, Any]] = []

    def simple_evaluate(self, **given: Any) -> dict[str, Any]:
        self.calls.append(given)
        if "unknown" in given["tasks"]:
            raise KeyError("unknown")
        better = Path(given["model_args"]["pretrained"]).parent.name == "one"
        right = [float(index < (4 if better else 3)) for index in range(SAMPLES)]
        likelihoods = [(-3.0 * index - 1, 2 + index) for index in range(SAMPLES)]
        mean = sum(one for one, _ in likelihoods) / sum(other for _, other in likelihoods)
        return {
            "results": {
                "quiz": {
                    "alias": "quiz",
                    "sample_len": SAMPLES,
                    "acc,none": sum(right) / SAMPLES,
                    "acc_stderr,none": 0.1,
                    "exact_match,strict": sum(right) / SAMPLES,
                    "exact_match_stderr,strict": "N/A",
                    "bleu,none": 12.3,
                },
                "text": {
                    "word_perplexity,none": math.exp(-mean),
                    "bits_per_byte,none": -mean / math.log(2),
                },
            },
            "higher_is_better": {
                "quiz": {"acc": True, "exact_match": None, "bleu": True},
                "text": {"word_perplexity": False, "bits_per_byte": False},
            },
            "samples": {
                "quiz": [
                    {"filter": kind, name: value, "bleu": ("a reference", "an answer")}
                    for value in right
                    for kind, name in (("none", "acc"), ("strict", "exact_match"))
                ],
                "text": [
                    {"filter": "none", "word_perplexity": one, "bits_per_byte": one} for one in likelihoods
                ],
            },
        }


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    stub = Harness()
    monkeypatch.setitem(sys.modules, "lm_eval", stub)
    return stub


def test_harness_tasks_are_scored_like_ours(tmp_path: Path, harness: Harness) -> None:
    recipe, merged, _ = pair(tmp_path, "llama-causal", "text")
    out = tmp_path / "out.json"
    given = ("evaluate", recipe, merged, "--lm-eval", "quiz,text", "--json", out, "--samples", "6")
    result = run(*given)
    assert "quiz: left out bleu: not told by single samples' values" in result.stderr
    found = json.loads(out.read_text())
    assert [task["task"].split(": ")[1] for task in found["tasks"]] == ["quiz", "text"] * 2
    quiz, text = found["tasks"][:2]
    assert quiz["metrics"] == ["acc", "exact_match (strict)"]
    assert quiz["scores"]["acc"][OWN]["value"] == pytest.approx(4 / 6)
    assert quiz["normalised"]["merged"]["value"] == pytest.approx(75)
    assert text["metrics"] == ["word_perplexity", "bits_per_byte"]
    mean = sum(-3.0 * index - 1 for index in range(SAMPLES)) / sum(2 + index for index in range(SAMPLES))
    assert text["scores"]["word_perplexity"]["merged"]["value"] == pytest.approx(math.exp(-mean))
    assert text["normalised"]["merged"]["value"] == pytest.approx(100)
    (first, *_), folders = harness.calls, [call["model_args"]["pretrained"] for call in harness.calls]
    assert folders == [str(tmp_path / "one" / "model"), str(tmp_path / "two" / "model"), str(merged)]
    assert first["limit"] == 6
    assert first["tasks"] == ["quiz", "text"]
    run(*given)
    assert len(harness.calls) == 3
    run(*given, "--force")
    assert len(harness.calls) == 6
    run("evaluate", recipe, merged, "--lm-eval", "quiz")
    assert len(harness.calls) == 9


def test_a_merge_can_be_called_like_the_fine_tuned_models_line(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, merged, _ = pair(tmp_path, "llama-causal", "text")
    monkeypatch.chdir(tmp_path)
    merged.rename(OWN)
    run("evaluate", recipe, OWN, "--lm-eval", "quiz", "--json", "out.json")
    scores = json.loads(Path("out.json").read_text())["tasks"][0]["scores"]["acc"]
    assert (scores[OWN]["value"], scores[f"./{OWN}"]["value"]) == pytest.approx((4 / 6, 3 / 6))


def test_what_the_harness_cannot_do_is_one_error(tmp_path: Path, harness: Harness) -> None:
    recipe, merged, _ = pair(tmp_path, "llama-causal", "text")
    assert "cannot run unknown on" in refused(recipe, merged, "--lm-eval", "unknown")
    said = refused(recipe, merged, "--lm-eval", "quiz", "--metric", "rouge")
    assert "lm-eval task quiz has no metric 'rouge'; it has acc, exact_match (strict)" in said
    other = tiny.checkpoint(tmp_path / "other", "llama")
    said = refused(recipe, other, "--lm-eval", "quiz")
    assert f"--lm-eval takes causal LMs, and {other} is made for sequence-classification" in said


def test_without_the_harness_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    recipe, merged, _ = pair(tmp_path, "llama-causal", "text")
    assert "--lm-eval needs lm-evaluation-harness: pip install 'lm-eval[hf]'" in refused(
        recipe, merged, "--lm-eval", "quiz"
    )
