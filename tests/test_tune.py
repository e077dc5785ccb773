"""`mergekit-fisher tune` on tiny models: the objective against loops by hand, the search, what it writes and refuses."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fisher_mask_mergekit import data as loading
from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.evaluation.plan import Options
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.tuning import tune as tuning
from fisher_mask_mergekit.tuning.coefficients import OCTAVES, Coefficients, normalizations, read_coefficients
from fisher_mask_mergekit.tuning.held_back import held_back
from fisher_mask_mergekit.tuning.study import Study, Trial, suggest
from fisher_mask_mergekit.tuning.written import with_coefficients
from tests import tiny
from tests.commands import SCRIPTS
from tests.test_cli import run
from tests.test_end_to_end import quickly, two_classifiers, weights_of
from tests.test_evaluate import pair, rows_of

MEASURED = 8  # Of the 24 rows that tiny data has.


@pytest.fixture
def drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A measured recipe of two classifiers with unlike heads: slices, an empty one among them."""
    monkeypatch.chdir(tmp_path)
    work, two, three = two_classifiers(tmp_path)
    options = [word for folder in (two, three) for word in ("--data", f"{folder}.jsonl")]
    text = quickly("mergekit-fisher", "init", two, three, *options)
    recipe = work / "recipe.yml"
    recipe.write_text(
        text.replace("samples: 128", f"samples: {MEASURED}").replace("dtype:", "# Why.\ndtype:")
    )
    quickly("mergekit-fisher", "compute", recipe)
    return recipe


def study_of(out: Path) -> dict[str, Any]:
    return json.loads(out.with_suffix(".trials.json").read_text())


def tuned(recipe: Path, trials: int, *options: str, out: str = "tuned.yml") -> dict[str, Any]:
    target = recipe.parent / out
    run("tune", recipe, target, "--trials", str(trials), *options)
    return study_of(target)


def refused(recipe: Path, *options: str | Path, out: str = "tuned.yml") -> str:
    result = run("tune", recipe, recipe.parent / out, "--trials", "2", *options, code=1)
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def rewritten(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return recipe


def by_hand(document: dict[str, Any], weights: dict[str, float], normalize: str | None) -> dict[str, Any]:
    """The recipe of a trial, for recipes as `init` drafts them."""
    for part in document["slices"]:
        for source in part["sources"]:
            if source["layer_range"][0] < source["layer_range"][1]:
                source["parameters"] = {"weight": weights[source["model"]]}
    parameters = document.get("parameters", {}) | ({"normalize": normalize} if normalize else {})
    return document | {"parameters": parameters}


def losses(folder: Path, rows: list[dict[str, Any]]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = [
            model(**tokenizer(row["text"], return_tensors="pt"), labels=torch.tensor([row["label"]])).loss
            for row in rows
        ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("pooler", ["own", "average"])
def test_a_trial_is_scored_as_a_loop_by_hand_scores_it(drafted: Path, pooler: str) -> None:
    options = ["--metric", "loss", "--samples", "10", "--batch-size", "3", "--pooler", pooler]
    found = tuned(drafted, 5, *options)
    work, trial = drafted.parent, found["trials"][4]
    assert sorted(trial["weights"]) == [str(work / "three"), str(work / "two")]
    document = by_hand(yaml.safe_load(drafted.read_text()), trial["weights"], trial["normalize"])
    (work / "hand.yml").write_text(yaml.safe_dump(document))
    quickly("mergekit-yaml", work / "hand.yml", work / "merged")
    quickly(
        "mergekit-fisher", "heads", work / "hand.yml", work / "merged", work / "tasks", "--pooler", pooler
    )
    order = numpy.random.default_rng(0).permutation(24)[MEASURED : MEASURED + 10]
    ratios = []
    for task in ("two", "three"):
        data = rows_of(work / f"{task}.jsonl")
        rows = [data[index] for index in order]
        own, merged = losses(work / task, rows), losses(work / "tasks" / task, rows)
        assert found["own"][task] == pytest.approx(own, rel=1e-5)
        assert trial["scores"][task] == pytest.approx(merged, rel=1e-5)
        ratios.append(100 * own / merged)
    assert trial["value"] == pytest.approx(sum(ratios) / 2, rel=1e-5)


@pytest.mark.parametrize("method", ["fisher_mask", "nodes: all", "linear", "fisher_diagonal"])
def test_the_written_recipe_gives_the_best_trials_merge(drafted: Path, method: str) -> None:
    named = "fisher_mask  # How.\nparameters: {nodes: all}" if method == "nodes: all" else f"{method}  # How."
    rewritten(drafted, "merge_method: fisher_mask", f"merge_method: {named}")
    if method in ("nodes: all", "fisher_diagonal"):
        quickly("mergekit-fisher", "compute", drafted)
    found = tuned(drafted, 6, "--metric", "loss")
    work, out = drafted.parent, drafted.parent / "tuned.yml"
    best = max(found["trials"], key=lambda trial: trial["value"])
    assert best["number"] > 0
    assert best["value"] > found["trials"][0]["value"]
    choices: dict[str, set[str | None]] = {
        "fisher_mask": {"none", "model", "layer", "tensor"},
        "nodes: all": {"none", "model", "tensor"},
        "fisher_diagonal": {"none", "model", "tensor"},
        "linear": {None},
    }
    assert {trial["normalize"] for trial in found["trials"]} <= choices[method]
    text = out.read_text()
    head, *rest = text.splitlines()
    assert head.startswith(
        f"# tuned: mergekit-fisher tune {drafted}: trial {best['number']}, the best of 6: "
    )
    assert f"mean normalised score {best['value']:.1f}; the recipe as it is: " in head
    assert f"16 of {work / 'two.jsonl'} (two), 16 of {work / 'three.jsonl'} (three)" in rest[0]
    # The user's comments and keys, in the user's order.
    kept = [line for line in drafted.read_text().splitlines() if "weight" not in line]
    assert [line for line in rest[1:] if line in kept] == kept
    assert "# How." in text
    assert "# Why." in text
    document = by_hand(yaml.safe_load(drafted.read_text()), best["weights"], best["normalize"])
    quickly("mergekit-yaml", out, work / "merged")
    encoder, _ = merge_in_memory(document, "by hand")
    written = load_file(work / "merged" / "model.safetensors")
    assert_close(dict(encoder.read(written)), written, rtol=0, atol=0)
    plain, _ = merge_in_memory(yaml.safe_load(drafted.read_text()), "untuned")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(dict(plain.read([name]))[name], written[name])


def planted(work: Path) -> Path:
    """A recipe of a model that is right on both tasks, and one whose encoder is spoilt for both."""
    good = tiny.checkpoint(work / "good", labels=2)
    tokenizer = AutoTokenizer.from_pretrained(good)
    files = {
        name: tiny.write_data(work / f"{name}.jsonl", rows=60, seed=seed)
        for seed, name in enumerate(("good", "bad"))
    }
    rows = {name: rows_of(file) for name, file in files.items()}
    model = AutoModelForSequenceClassification.from_pretrained(good).eval()

    def margin(row: dict[str, Any]) -> float:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        return float(logits[1] - logits[0])

    middle = float(numpy.median([margin(row) for part in rows.values() for row in part]))
    state = weights_of(good)
    state["classifier.bias"][1] -= middle  # So that it says either label about as often, and means it.
    state |= {name: 20 * value for name, value in state.items() if name.startswith("classifier")}
    save_file(state, good / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    spoilt = {
        name: value + torch.randn_like(value) * 0.2 * ("encoder" in name) for name, value in state.items()
    }
    save_file(spoilt, shutil.copytree(good, work / "bad") / "model.safetensors", {"format": "pt"})
    lines = []
    for name, part in rows.items():
        labelled = [row | {"label": int(margin(row) > middle)} for row in part]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in labelled))
        lines.append(
            f"  - {{model: {work / name}, fisher: {{data: {files[name]}}}, parameters: {{weight: 1.0}}}}"
        )
    recipe = work / "recipe.yml"
    recipe.write_text("\n".join(["merge_method: linear", "models:", *lines, "fisher: {samples: 10}\n"]))
    return recipe


def test_a_planted_optimum_is_found(tmp_path: Path) -> None:
    recipe = planted(tmp_path)
    found = tuned(recipe, 16, "--metric", "loss")
    weights = yaml.safe_load((tmp_path / "tuned.yml").read_text())["models"]
    good, bad = (entry["parameters"]["weight"] for entry in weights)
    assert good == 1.0
    assert bad < 0.15
    best = max(found["trials"], key=lambda trial: trial["value"])
    assert best["weights"][str(tmp_path / "bad")] == bad
    # The less of what is spoilt the better, so the best is about the least that was tried.
    assert bad <= sorted(trial["weights"][str(tmp_path / "bad")] for trial in found["trials"])[2]


def test_the_search_learns_from_its_trials() -> None:
    """A smooth peak over two lambdas and a choice: late trials are near it, which 1 in 48 is by chance."""
    own, choices = (
        Coefficients({"a": 2.0, "b": 2.0, "out": 0.0, "c": 3.0}, "none"),
        ("none", "model", "layer"),
    )

    def distance(one: Coefficients) -> float:
        return max(abs(one.octaves["b"] - 2.5), abs(one.octaves["c"] + 1.5))

    def searched(seed: int) -> list[Coefficients]:
        trials: list[Trial] = []
        for number in range(45):
            tried = suggest(own, choices, trials, seed)
            assert tried.weights["a"] == 2.0
            assert tried.weights["out"] == 0.0
            assert max(map(abs, tried.octaves.values())) <= OCTAVES + 1e-3
            value = (tried.normalize == "layer") - distance(tried) ** 2
            # One whose score is not defined teaches nothing, and is no error.
            trials.append(Trial(number=number, weights=dict(tried.weights), normalize=tried.normalize, scores={}, value=value if number % 7 else None))  # fmt: skip
        return [trial.coefficients for trial in trials]

    runs = [searched(seed) for seed in range(5)]
    late = [one for tried in runs for one in tried[30:]]
    assert sum(one.normalize == "layer" and distance(one) < 1 for one in late) >= 15  # Of 75.
    for tried in runs:
        assert len({tuple(one.weights.values()) for one in tried[4:]}) == 41
        assert tried[0] == own
        assert [one.normalize for one in tried[1:4]] == list(choices)
        assert all(set(one.weights.values()) == {2.0, 0.0} for one in tried[1:4])


def test_a_prior_is_searched_too() -> None:
    """A peak at a sixth of the recipe's prior: late trials are near it, which one in eight is by chance."""
    own = Coefficients({"prior": 1.0, "normalize": 1.0}, "tensor", 3.0)  # Models may be called anything.
    late: list[Coefficients] = []
    for seed in range(3):
        trials: list[Trial] = []
        for number in range(30):
            tried = suggest(own, ("model", "tensor"), trials, seed)
            assert tried.prior is not None
            off = abs(math.log2(tried.prior / 0.5))
            trials.append(Trial(number=number, weights=dict(tried.weights), normalize=tried.normalize, prior=tried.prior, scores={}, value=-off))  # fmt: skip
        assert [one.prior for one in trials[:2]] == [3.0, 3.0]  # The recipe, and its other normalize.
        assert all(3 / 2**OCTAVES * 0.999 <= (one.prior or 0) <= 3 * 2**OCTAVES * 1.001 for one in trials)
        late += [one.coefficients for one in trials[20:]]
    assert sum(abs(math.log2((one.prior or 0) / 0.5)) < 0.5 for one in late) >= 10  # Of 30.


def test_trials_of_before_a_prior_was_searched_count_as_the_recipes_own() -> None:
    own = Coefficients({"a": 1.0, "b": 1.0}, "tensor", 3.0)
    trials = [
        Trial(number=number, weights={"a": 1.0, "b": 1.0 + number}, normalize="tensor", scores={}, value=1.0)
        for number in range(12)
    ]
    tried = suggest(own, ("model", "tensor"), trials, seed=0)
    told = [one.model_copy(update={"prior": 3.0}) for one in trials]
    assert suggest(own, ("model", "tensor"), told, seed=0) == tried


def test_a_number_that_is_not_moved_is_left_as_it_is() -> None:
    own = Coefficients({"a": 1.0, "b": 1.0}, "tensor", 2 / 3)
    assert own.at({"b": 0.0}, "tensor") == own
    assert own.at({"b": 0.0}, "tensor", 1.0).prior == 1.333


def test_two_seeds_share_no_trials() -> None:
    own = Coefficients({"a": 1.0, "b": 1.0}, None)
    # Of trials without a score, nothing is learned: what is tried is the generator's alone.
    trials = [Trial(number=number, weights={"a": 1.0, "b": 1.0}, normalize=None, scores={}, value=None) for number in range(9)]  # fmt: skip
    tried = [
        suggest(own, (), trials[:count], seed).weights["b"] for seed in range(3) for count in range(1, 9)
    ]
    assert len(set(tried)) == len(tried)


def test_a_lambda_beyond_the_range_widens_it() -> None:
    own = Coefficients({"a": 1.0, "b": 100.0}, None)
    trials: list[Trial] = []
    for number in range(30):
        tried = suggest(own, (), trials, seed=0)
        trials.append(Trial(number=number, weights=dict(tried.weights), normalize=None, scores={}, value=tried.weights["b"]))  # fmt: skip
    assert max(one.weights["b"] for one in trials[2:]) > 16
    assert max(one.weights["b"] for one in trials) == 100


def test_ties_go_to_the_recipe_as_it_is(drafted: Path) -> None:
    found = Study.model_validate(tuned(drafted, 3))
    flat = found.but(trials=[trial.model_copy(update={"value": 50.0}) for trial in found.trials])
    assert flat.best.number == 0
    undefined = found.but(trials=[found.trials[0].model_copy(update={"value": None}), *found.trials[1:]])
    assert undefined.best.number > 0


def test_a_run_that_goes_on_makes_the_trials_of_one_that_was_not_interrupted(drafted: Path) -> None:
    whole = tuned(drafted, 14, "--metric", "loss", out="whole.yml")
    tuned(drafted, 2, "--metric", "loss")
    tuned(drafted, 12, "--metric", "loss")
    parts = tuned(drafted, 14, "--metric", "loss")
    assert parts["trials"] == whole["trials"]
    tried = [(tuple(trial["weights"].values()), trial["normalize"]) for trial in whole["trials"]]
    assert len(set(tried)) > 11
    other = tuned(drafted, 14, "--metric", "loss", "--seed", "1", out="other.yml")
    assert other["trials"][:3] == whole["trials"][:3]
    assert other["trials"][3:] != whole["trials"][3:]
    best = [(drafted.parent / name).read_text() for name in ("tuned.yml", "whole.yml")]
    assert best[0] == best[1]


def test_a_killed_run_loses_nothing(drafted: Path) -> None:
    whole = tuned(drafted, 12, out="whole.yml")
    out = drafted.parent / "tuned.yml"
    study = out.with_suffix(".trials.json")
    command: list[str | Path] = [SCRIPTS / "mergekit-fisher", "tune", drafted, out, "--trials", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 120
            while not study.exists() or len(study_of(out)["trials"]) < 4:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()  # SIGKILL.
    kept = study_of(out)["trials"]
    assert len(kept) >= 4
    assert not out.exists()
    count = max(12, len(kept))
    after = tuned(drafted, count)["trials"]
    assert after[: len(kept)] == kept
    assert after[:12] == whole["trials"]
    assert out.exists()


def test_two_runs_on_one_out_do_not_mix(drafted: Path) -> None:
    out = drafted.parent / "tuned.yml"
    study = out.with_suffix(".trials.json")
    command: list[str | Path] = [SCRIPTS / "mergekit-fisher", "tune", drafted, out, "--trials", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 120
            while not study.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            said = refused(drafted)
            assert (
                f"another run of mergekit-fisher tune is at {study}; wait until it ends, or choose another OUT"
                in said
            )
            assert process.poll() is None
            tuned(drafted, 1, out="other.yml")
        finally:
            process.kill()  # SIGKILL: its lock goes with it.
    count = len(study_of(out)["trials"])
    assert len(tuned(drafted, count + 1)["trials"]) == count + 1


def test_a_finished_run_answers_at_once_and_a_longer_one_goes_on(
    drafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = drafted.parent / "tuned.yml"
    first = run("tune", drafted, out, "--trials", "4").stdout
    made: list[int] = []
    plain = tuning.run_trial

    def counted(*given: Any) -> Any:
        made.append(given[2])
        return plain(*given)

    monkeypatch.setattr(tuning, "run_trial", counted)
    monkeypatch.setattr(tuning, "own_scores", None)
    written = out.read_text()
    assert run("tune", drafted, out, "--trials", "4").stdout == first
    assert run("tune", drafted, out, "--trials", "2").stdout == first
    # Comments do not count.
    drafted.write_text("# A comment.\n" + drafted.read_text())
    run("tune", drafted, out, "--trials", "4")
    assert out.read_text().replace("# A comment.\n", "") == written
    assert made == []
    tuned(drafted, 6)
    assert made == [4, 5]


def test_what_is_printed(drafted: Path) -> None:
    work, out = drafted.parent, drafted.parent / "tuned.yml"
    shown = run("tune", drafted, out, "--trials", "4", "--metric", "accuracy,loss").stdout
    found = study_of(out)
    best = max(found["trials"], key=lambda trial: trial["value"])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert cells[0] == ["", "fine-tuned", "recipe as it is", f"trial {best['number']}, the best of 4"]
    assert [row[0] for row in cells[2:8]] == [
        "weight of two",
        "weight of three",
        "normalize",
        "two accuracy",
        "three accuracy",
        "mean normalised",
    ]
    assert cells[5][1:3] == [f"{found['own']['two']:.3f}", f"{found['trials'][0]['scores']['two']:.3f}"]
    assert cells[7][2:] == [f"{found['trials'][0]['value']:.1f}", f"{best['value']:.1f}"]
    assert f"16 of {work / 'two.jsonl'} (two), 16 of {work / 'three.jsonl'} (three)" in shown
    assert f"mergekit-fisher evaluate {drafted} merged-recipe merged-tuned" in shown


def test_the_rows_are_those_after_the_measured_ones(drafted: Path) -> None:
    work = drafted.parent

    def texts(samples: int = 256) -> list[list[str]]:
        found = held_back(read_recipe(drafted), samples, Options())
        return [[text for (text,) in one.samples.texts] for one in found.subjects]

    rows = [row["text"] for row in rows_of(work / "two.jsonl")]

    def drawn(seed: int) -> list[str]:
        return [rows[index] for index in numpy.random.default_rng(seed).permutation(24)]

    assert texts()[0] == drawn(0)[MEASURED:]
    assert texts(3)[0] == drawn(0)[MEASURED : MEASURED + 3]
    # A measurement by other settings than the recipe's: what the sidecar says.
    quickly(
        "mergekit-fisher",
        "compute",
        work / "two",
        "--data",
        work / "two.jsonl",
        "--samples",
        "5",
        "--seed",
        "3",
    )
    assert texts()[0] == drawn(3)[5:]
    assert texts()[1] == [rows_of(work / "three.jsonl")[i]["text"] for i in numpy.random.default_rng(0).permutation(24)[MEASURED:]]  # fmt: skip
    # Linear needs no sidecar, but what one was measured on is left out all the same.
    rewritten(drafted, "fisher_mask", "linear")
    assert texts()[0] == drawn(3)[5:]
    assert held_back(read_recipe(drafted), 256, Options()).notes == ()
    # Of other data, a sidecar says nothing of these rows: that is said.
    quickly("mergekit-fisher", "compute", work / "two", "--data", work / "three.jsonl", "--samples", "5", "--seed", "3", "--label-map", "0=0,1=1,2=1")  # fmt: skip
    assert texts()[0] == drawn(0)[MEASURED:]
    said = run("tune", drafted, work / "tuned.yml", "--trials", "1").stderr
    assert f"{work / 'two'}: which rows of '{work / 'two.jsonl'}' it was measured on is not known: " in said
    assert f"was measured on other rows (of '{work / 'three.jsonl'}' as it was then)" in said
    assert f"Held back are those after the first {MEASURED} by seed 0, as the recipe has it" in said
    (work / "two" / "fisher" / "mask_fisher.safetensors").write_text("torn")
    (note,) = held_back(read_recipe(drafted), 256, Options()).notes
    assert "is not known: " in note
    assert "mask_fisher.safetensors" in note


def test_rows_that_held_nothing_to_predict_were_drawn_too(tmp_path: Path) -> None:
    recipe, _, data = pair(tmp_path, "bert-tokens", "token-classification")
    rows = [{"tokens": [f"w{row}", "w40"], "ner_tags": [-100, -100] if row % 2 else [row % 4 // 2, 1]} for row in range(20)]  # fmt: skip
    for file in (data, tmp_path / "two" / "data.jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewritten(recipe, "eval: ", "data: ")
    # Asked for by the sidecar alone.
    for name in ("one", "two"):
        folder = tmp_path / name
        quickly(
            "mergekit-fisher", "compute", folder / "model", "--data", folder / "data.jsonl", "--samples", "9"
        )
    recipe.write_text(recipe.read_text() + "fisher: {samples: 2}\n")
    found = held_back(read_recipe(recipe), 256, Options())
    assert found.notes == ()
    wanted = [rows[index]["tokens"] for index in numpy.random.default_rng(0).permutation(20)[9:]]
    for subject in found.subjects:
        assert [list(words) for words in subject.samples.texts] == wanted


def test_the_reporting_split_is_looked_at_only_for_rows_in_both(
    drafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, loads, plain = drafted.parent, [], loading._load

    def spied(spec: loading.DataSpec) -> Any:
        loads.append((spec.path, spec.split))
        return plain(spec)

    monkeypatch.setattr(loading, "_load", spied)
    other = tiny.write_data(work / "held.jsonl", seed=5)
    rewritten(drafted, 'two.jsonl"}', f'two.jsonl", eval: {other}}}')
    rewritten(drafted, 'three.jsonl"}', 'three.jsonl", eval: "org/absent:config"}')
    read = read_recipe(drafted)
    looked = tuning.prepare(read, work / "tuned.yml", 256, Options(), torch.device("cpu"))
    assert [path for path, _ in loads].count("org/absent") == 1
    assert [path for path, _ in loads].count(str(other)) == 1
    other.unlink()
    loads.clear()
    tuning.run(looked, 4, lambda study: None)
    assert loads == []
    # What cannot be loaded was not checked, and that is said.
    (note,) = looked.notes
    assert (
        f"{work / 'three'}: its held-back rows were not compared with those of the reporting split " in note
    )
    assert "'org/absent:config:validation': cannot load data 'org/absent' (split validation)" in note


def test_reported_rows_are_found_on_the_hub_and_under_other_labels(
    drafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, plain = drafted.parent, loading._load
    rows = rows_of(work / "two.jsonl")
    last = numpy.random.default_rng(0).permutation(24)[-3:]
    other = rows_of(tiny.write_data(work / "held.jsonl", seed=5))
    tables = {
        ("org/set", "train"): rows,
        ("mirror", "validation"): [*other, *(rows[index] for index in last)],
        # Labels that the checkpoint does not have, and none at all.
        ("labels", "validation"): [*({**row, "label": 9} for row in other), {**rows[last[0]], "label": -1}],
        ("unlabelled", "validation"): [{"text": rows[index]["text"]} for index in last[:2]],
    }  # fmt: skip

    def served(spec: loading.DataSpec) -> Any:
        known = tables.get((spec.path, spec.split))
        return plain(spec) if known is None else datasets.Dataset.from_list(known)

    monkeypatch.setattr(loading, "_load", served)
    text = drafted.read_text()
    for name, count in (("mirror", 3), ("labels", 1), ("unlabelled", 2)):
        drafted.write_text(text.replace(f'data: "{work / "two.jsonl"}"', f"data: org/set, eval: {name}"))
        assert f"{count} of 16 rows held back of 'org/set' are also in the reporting split '{name}::validation'" in refused(drafted)  # fmt: skip
    local = work / "other-labels.jsonl"
    local.write_text("".join(json.dumps({**rows[index], "label": 7}) + "\n" for index in last))
    drafted.write_text(text.replace('two.jsonl"}', f'two.jsonl", eval: {local}}}'))
    assert "3 of 16 rows held back of" in refused(drafted)


def test_a_prompt_is_a_sample_with_its_completion_only(tmp_path: Path) -> None:
    recipe, _, data = pair(tmp_path, "gpt2-causal", "completion")
    rows = rows_of(data)
    other = tmp_path / "other.jsonl"
    rewritten(recipe, f"eval: {data}", f"data: {data}, eval: {other}")
    rewritten(recipe, "{eval: ", "{data: ")
    recipe.write_text(recipe.read_text() + "fisher: {samples: 3}\n")
    other.write_text("".join(json.dumps({**row, "completion": "w9 w9 w9 w9"}) + "\n" for row in rows))
    assert held_back(read_recipe(recipe), 256, Options()).notes == ()
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"5 of 5 rows held back of '{data}' are also in" in refused(recipe)


def test_the_reporting_split_is_refused(drafted: Path) -> None:
    work = drafted.parent
    text = drafted.read_text()
    plain = f'data: "{work / "two.jsonl"}"'
    (work / "link.jsonl").symlink_to(work / "two.jsonl")
    (work / "hard.jsonl").hardlink_to(work / "two.jsonl")
    folder = work / "folder"
    made = {name: datasets.Dataset.from_list(rows_of(work / "two.jsonl")) for name in ("train", "validation")}
    datasets.DatasetDict(made).save_to_disk(folder)
    for given in (
        f"{plain}, eval: {work / 'two.jsonl'}",
        f"{plain}, eval: two.jsonl",
        f"{plain}, eval: {work / 'link.jsonl'}",
        f"{plain}, eval: hard.jsonl",
        f"data: '{folder}::validation'",
        f"data: '{folder}', eval: '{folder}::train'",
        f"data: '{folder}/train', eval: '{folder}::train'",
        "data: 'org/set:name:validation'",
        "data: 'org/set:name', eval: 'org/set:name:train@main'",
        "data: 'org/set', eval: 'org/set:default:train'",
        "data: 'org/set:name:train+validation'",
        "data: 'org/set:name:all'",
        "data: 'org/set:name', eval: 'org/set:name:all'",
        "data: 'org/set:name:all', eval: 'org/set:name:test'",
    ):
        drafted.write_text(text.replace(plain, given))
        said = refused(drafted)
        assert "a tuning run was asked to use the reporting split" in said, given
        assert f"is what merges are evaluated on for {work / 'two'}" in said
    # Slices are no splits, of which nothing could be told by name.
    for given in ("data: 'org/set:name:train[:9]'", f"{plain}, eval: 'org/set:name:train[9:]'"):
        drafted.write_text(text.replace(plain, given))
        assert "is not of the form path[:config[:split]][@revision]" in refused(drafted)
    # What another model is reported on.
    drafted.write_text(
        text.replace(f'data: "{work / "three.jsonl"}"', f'data: "{work / "three.jsonl"}", eval: two.jsonl')
    )
    assert f"{work / 'two'} has data '{work / 'two.jsonl'}', which is what merges are evaluated on for {work / 'three'}" in refused(drafted)  # fmt: skip
    # The same rows under another name, and of one only a part.
    order = numpy.random.default_rng(0).permutation(24)
    lines = (work / "two.jsonl").read_text().splitlines(keepends=True)
    for count in (16, 3):
        (work / "copy.jsonl").write_text("".join(lines[index] for index in order[: MEASURED + count]))
        drafted.write_text(text.replace(plain, f"{plain}, eval: copy.jsonl"))
        assert f"{count} of 16 rows held back of '{work / 'two.jsonl'}' are also in the reporting split 'copy.jsonl'" in refused(drafted)  # fmt: skip
    (work / "copy.jsonl").write_text("".join(lines[index] for index in order[:MEASURED]))
    tuned(drafted, 1)


def test_recipes_that_cannot_be_tuned(drafted: Path) -> None:
    work, text = drafted.parent, drafted.read_text()
    weight = "parameters: {weight: 1.0}"

    def said(old: str, new: str, count: int = -1) -> str:
        assert old in text
        drafted.write_text(text.replace(old, new, count))
        return refused(drafted)

    assert "tune knows fisher_mask, fisher_diagonal and linear, not ties" in said("fisher_mask", "ties")
    for varying in ("[0.1, 0.9]", "[{filter: query, value: 0.5}, {value: 1}]"):
        assert f"the weight of {work / 'two'} is not one plain number (a filter, a gradient" in said(weight, f"parameters: {{weight: {varying}}}", 1)  # fmt: skip
    assert f"weight of {work / 'two'} is -1.0; expected a number of 0 or more" in said("1.0}", "-1.0}", 1)
    assert "only 1 of its models have a weight above 0; there is nothing to tune" in said("1.0}", "0}", 1)
    assert "normalize is 'rows'; tune takes one plain name for the whole merge: none, model, layer, tensor" in said("dtype:", "parameters: {normalize: rows}\ndtype:")  # fmt: skip
    assert "normalize is ['model', None]; tune takes one plain name" in said("  - sources:", "  - parameters: {normalize: model}\n    sources:", 1)  # fmt: skip
    assert "linear with normalize: False: tune keeps the scale" in said("fisher_mask", "linear\nparameters: {normalize: false}")  # fmt: skip
    assert f"nothing says what {work / 'three'} was trained on" in said(f'fisher: {{data: "{work / "three.jsonl"}"}}', "")  # fmt: skip
    shared = text.replace(weight, "parameters: &same {weight: 1.0}", 1).replace(
        weight, "parameters: *same", 1
    )
    drafted.write_text(shared)
    assert "write its models out, without anchors (&) and aliases (*)" in refused(drafted)
    common = text.replace(weight, "parameters: *common", 2).replace(
        "slices:", "parameters: &common {weight: 1.0}\nslices:"
    )
    drafted.write_text(common)
    assert "without anchors (&) and aliases (*)" in refused(drafted)
    # Trials move a prior, too.
    priors = "common: &one {normalize: tensor, prior: 1}\nparameters: *one\nslices:"
    drafted.write_text(text.replace("slices:", priors, 1))
    assert "without anchors (&) and aliases (*)" in refused(drafted)
    drafted.write_text("merge_method: [")
    assert "is not YAML" in refused(drafted)
    assert not (work / "tuned.yml").exists()
    assert not (work / "tuned.trials.json").exists()


@pytest.mark.parametrize("bomb", ["nested", "itself"])
def test_aliases_that_would_fill_the_memory_are_refused(
    drafted: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7))]  # fmt: skip
    text = "\n".join(lines) if bomb == "nested" else "a: &a [*a]"
    drafted.write_text(f"{text}\n{drafted.read_text()}")
    monkeypatch.setattr(tuning, "json", None)  # Which would write it all out.
    said = refused(drafted)
    assert "has more than 100,000 values where its aliases (*) are written out" in said
    assert not (drafted.parent / "tuned.trials.json").exists()


def test_data_that_leaves_nothing_to_hold_back(drafted: Path) -> None:
    work, text = drafted.parent, drafted.read_text()
    quickly("mergekit-fisher", "compute", work / "three", "--data", work / "three.jsonl", "--samples", "24")
    said = refused(drafted)
    assert f"data '{work / 'three.jsonl'}' has 24 rows; after the first 24, none is left to hold back" in said
    assert f"{work / 'three'} is measured on all of them; measure it on fewer: fisher: {{samples: N}}" in said
    drafted.write_text(text.replace("three.jsonl", "none.jsonl"))
    assert f"there is no data file {work / 'none.jsonl'}" in refused(drafted)
    (work / "none.jsonl").write_text("")
    assert f"data '{work / 'none.jsonl'}' has no rows" in refused(drafted)
    rewritten(drafted, "none.jsonl", "two.jsonl")
    assert "f1' does not fit" in refused(drafted, "--metric", "f1")


def test_a_score_that_nothing_can_be_divided_by(tmp_path: Path) -> None:
    recipe = planted(tmp_path)
    rows = rows_of(tmp_path / "good.jsonl")
    (tmp_path / "good.jsonl").write_text(
        "".join(json.dumps(row | {"label": 1 - row["label"]}) + "\n" for row in rows)
    )
    said = refused(recipe)
    assert f"{tmp_path / 'good'} has accuracy 0 on the held-back rows of its own task" in said
    assert "choose another --metric" in said


def test_without_what_it_needs_it_says_what_to_install(
    drafted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optuna", "ruamel.yaml"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            assert "tune needs Optuna and ruamel.yaml: pip install 'fisher-mask-mergekit[tune]'" in refused(
                drafted
            )


def test_files_that_are_in_the_way(drafted: Path) -> None:
    work, out = drafted.parent, drafted.parent / "tuned.yml"
    study = work / "tuned.trials.json"
    said = refused(drafted, out="nowhere/tuned.yml")
    assert f"cannot write {work / 'nowhere' / 'tuned.yml'}: its folder does not exist" in said
    (work / "folder.yml").mkdir()
    assert "it is a folder" in refused(drafted, out="folder.yml")
    before = drafted.read_bytes()
    assert "recipe.yml is the recipe itself; choose another OUT" in refused(drafted, out="recipe.yml")
    (work / "other.yml").write_text("The user's.")
    assert "other.yml exists, and no study beside it" in refused(drafted, out="other.yml")
    tuned(drafted, 2)
    shutil.copy(study, work / "other.trials.json")
    assert "other.yml exists, and is not what this run wrote" in refused(drafted, out="other.yml")
    assert drafted.read_bytes() == before
    out.write_text(out.read_text() + "# The user's.\n")
    assert "tuned.yml exists, and is not what this run wrote; remove it, or choose another OUT" in refused(drafted)  # fmt: skip
    assert "# The user's." in out.read_text()
    out.unlink()
    whole = study.read_text()
    for torn in (
        whole[:-30],
        "",
        "[]",
        whole.replace('"number": 1', '"number": 7'),
        whole.replace('"own"', '"other"'),
    ):
        study.write_text(torn)
        assert "tuned.trials.json is torn, or not a study of mergekit-fisher tune; remove it to begin anew" in refused(drafted)  # fmt: skip
        assert study.read_text() == torn
        assert not out.exists()


def test_another_runs_study_is_refused_and_what_differs_is_named(drafted: Path) -> None:
    work, text = drafted.parent, drafted.read_text()
    tuned(drafted, 1)
    before = (work / "tuned.trials.json").read_text()
    two = work / "two"
    for options, named in (
        (("--samples", "5"), f"held-back rows of {two}; held-back rows of {work / 'three'}; --samples: 256 then, 5 now"),
        (("--metric", "loss"), f"metric of {two}: accuracy then, loss now; metric of {work / 'three'}: accuracy then, loss now"),
        (("--seed", "4", "--batch-size", "7"), "--seed: 0 then, 4 now; --batch-size: 32 then, 7 now"),
        (("--pooler", "average"), "--pooler: own then, average now"),
        (("--dtype", "float64"), f"dtype of {two}: float32 then, float64 now"),
    ):  # fmt: skip
        said = refused(drafted, *options)
        assert f"tuned.trials.json is the study of another run; what differs: {named}" in said
        assert "; remove it to begin anew, or choose another OUT" in said
    drafted.write_text(text.replace("1.0}", "1.5}", 1))
    assert "what differs: recipe; remove" in refused(drafted)
    drafted.write_text(text)
    quickly(
        "mergekit-fisher", "compute", two, "--data", work / "two.jsonl", "--samples", "8", "--labels", "exact"
    )
    assert f"what differs: sidecar of {two}; remove" in refused(drafted)
    state = load_file(two / "model.safetensors")
    state["classifier.bias"][0] += 1
    save_file(state, two / "model.safetensors", {"format": "pt"})
    assert f"what differs: checkpoint {two}; sidecar of {two}; remove" in refused(drafted)
    assert (work / "tuned.trials.json").read_text() == before


def test_a_language_model_by_hand(tmp_path: Path) -> None:
    recipe, _, data = pair(tmp_path, "llama-causal", "text")
    rewritten(recipe, "eval: ", "data: ")
    recipe.write_text(recipe.read_text() + "fisher: {samples: 3}\n")
    found = tuned(recipe, 4)
    trial = found["trials"][3]
    folders = [tmp_path / name / "model" for name in ("one", "two")]
    states = [weights_of(folder) for folder in folders]
    shares = [trial["weights"][str(folder)] for folder in folders]
    assert shares[0] == 1.0
    assert shares[1] != 1.0
    model = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    own = model.state_dict() | {}
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    rows = rows_of(data)
    order = numpy.random.default_rng(0).permutation(len(rows))[3:]
    merged = {name: sum(s * state[name] for s, state in zip(shares, states, strict=True)) / sum(shares) for name in states[0]}  # fmt: skip
    for state, score in ((own, found["own"]), (own | merged, trial["scores"])):
        model.load_state_dict(state)
        total, count = 0.0, 0
        for index in order:
            ids = tokenizer(rows[index]["text"], return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        assert next(iter(score.values())) == pytest.approx(total / count, rel=1e-4)
    rewritten(recipe, "merge_method:", "tokenizer_source: union\nmerge_method:")
    assert "not with the one that tokenizer_source builds; remove tokenizer_source" in refused(recipe)


def test_the_merges_it_says_to_compare_have_names_of_their_own(drafted: Path) -> None:
    (drafted.parent / "best").mkdir()
    out = drafted.parent / "best" / drafted.name
    shown = run("tune", drafted, out, "--trials", "1").stdout
    assert f"mergekit-yaml {drafted} merged-recipe\n" in shown
    assert f"mergekit-yaml {out} merged-recipe-tuned\n" in shown
    assert f"mergekit-fisher evaluate {drafted} merged-recipe merged-recipe-tuned" in shown


def test_what_counts_is_read_place_by_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        "merge_method: fisher_mask\nbase_model: a\nparameters: {prior: 1, normalize: tensor}\nslices:\n"
        "  - base_model: p\n    sources: [{model: a}, {model: b, parameters: {weight: 2e-1}}, {model: p}]\n"
    )
    assert read_coefficients(read_recipe(path)).weights == {"a": 1.0, "b": 0.2}


def test_a_recipe_that_builds_a_tokenizer_is_refused(tmp_path: Path) -> None:
    recipe, _, _ = pair(tmp_path, "bert-tokens", "token-classification")
    rewritten(recipe, "eval: ", "data: ")
    recipe.write_text(recipe.read_text() + "fisher: {samples: 3}\ntokenizer: {source: union}\n")
    assert "with the models' own tokenizers, not with the one that tokenizer builds" in refused(recipe)


def changed(text: str, tmp_path: Path, normalize: str | None = "model") -> Any:
    """A recipe with every counted lambda doubled but the first, and another ``normalize``."""
    path = tmp_path / "some.yml"
    path.write_text(text)
    recipe = read_recipe(path)
    own = read_coefficients(recipe)
    return with_coefficients(
        recipe, own.at({name: octave + 1 for name, octave in own.octaves.items()}, normalize)
    )


def test_coefficients_go_wherever_a_model_is_named(tmp_path: Path) -> None:
    text = """
merge_method: fisher_mask
base_model: d
parameters: {weight: 3, unmasked: layer}
slices:
  - parameters: {normalize: layer}
    sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: 2, sidecar: s}}
      - {model: b, layer_range: [0, 1]}
      - {model: c, layer_range: [0, 1], parameters: {weight: 0}}
  - parameters: {normalize: layer}
    sources: [{model: b, layer_range: [1, 2]}, {model: a, layer_range: [1, 2], parameters: {weight: 2}}]
  - parameters: {normalize: layer}
    sources: [{model: a, layer_range: [2, 2], parameters: {weight: 5}}]
"""
    found = changed(text, tmp_path)
    assert found["parameters"] == {"weight": 6, "unmasked": "layer", "normalize": "model"}
    first, second, third = (part["sources"] for part in found["slices"])
    assert [one["parameters"] for one in first] == [
        {"weight": 2, "sidecar": "s"},
        {"weight": 6},
        {"weight": 0},
    ]
    assert [one["parameters"] for one in second] == [{"weight": 6}, {"weight": 2}]
    assert third == [{"model": "a", "layer_range": [2, 2], "parameters": {"weight": 5}}]
    assert [part["parameters"] for part in found["slices"]] == [{}, {}, {}]
    text = """
merge_method: linear
base_model: d
modules:
  tower: {parameters: {weight: 4}, models: [{model: a}, {model: b}]}
"""
    found = changed(text, tmp_path, None)["modules"]["tower"]
    assert found == {
        "parameters": {"weight": 4},
        "models": [{"model": "a", "parameters": {"weight": 4}}, {"model": "b", "parameters": {"weight": 8}}],
    }


def test_an_untouched_normalize_is_not_written_down(tmp_path: Path) -> None:
    text = "merge_method: fisher_mask\nmodels: [{model: a}, {model: b}]\n"
    assert "parameters" not in changed(text, tmp_path, "none")
    assert changed(text, tmp_path)["parameters"] == {"normalize": "model"}


def test_a_prior_is_moved_where_it_is_one_number_for_the_whole_merge(tmp_path: Path) -> None:
    path = tmp_path / "some.yml"
    text = """
merge_method: fisher_mask
base_model: c
parameters: {normalize: tensor, prior: %s}
slices:
  - parameters: {%s}
    sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
  - parameters: {%s}
    sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]
"""
    path.write_text(text % ("1", "", "prior: 1"))
    recipe = read_recipe(path)
    found = with_coefficients(recipe, read_coefficients(recipe).at({"b": 0.0}, "tensor", 1.5))
    assert found["parameters"] == {"normalize": "tensor", "prior": 2.828}
    assert [part["parameters"] for part in found["slices"]] == [{}, {}]
    path.write_text(text % ("1e-2", "", ""))  # Text, to YAML 1.1; a number to the merge.
    assert read_coefficients(read_recipe(path)).prior == 0.01
    for top, second in (
        ("1", "prior: 2"),
        ("0", "prior: 1"),
        ("[1, 2]", ""),
        ("much", ""),
        (9 * "9" * 99, ""),
    ):
        path.write_text(text % (top, "", second))
        recipe = read_recipe(path)
        own = read_coefficients(recipe)
        assert own.prior is None
        found = with_coefficients(recipe, own.at({"b": 1.0}, "model", 1.0))
        assert found["parameters"]["prior"] == recipe.document["parameters"]["prior"]
        assert found["slices"][1]["parameters"] == recipe.document["slices"][1]["parameters"]


def test_a_merge_from_the_parent_is_always_normalized(tmp_path: Path) -> None:
    path = tmp_path / "some.yml"
    text = "merge_method: fisher_mask\nmodels: [{model: a}, {model: b}]\nbase_model: c\nparameters: {prior: 1, normalize: %s}\n"
    path.write_text(text % "tensor")
    recipe = read_recipe(path)
    assert normalizations(recipe) == ("model", "layer", "tensor")
    assert read_coefficients(recipe) == Coefficients({"a": 1.0, "b": 1.0}, "tensor", 1.0)
    path.write_text(text % "none")
    with pytest.raises(
        RecipeError, match=r"normalize is 'none'; tune takes one plain name .*: model, layer, tensor"
    ):
        read_coefficients(read_recipe(path))
