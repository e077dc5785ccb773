"""`mergekit-fisher evaluate` on tiny models, against loops by hand."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from fisher_mask_mergekit.cli.output import progress
from fisher_mask_mergekit.evaluation import run as running
from fisher_mask_mergekit.evaluation.plan import Merge, Options, plan_merges, subjects
from fisher_mask_mergekit.evaluation.predictions import Predictions, load_predictions, save_predictions
from fisher_mask_mergekit.evaluation.scores import OWN
from fisher_mask_mergekit.in_memory import merge_in_memory
from fisher_mask_mergekit.recipe import read_recipe
from tests import tiny
from tests.test_cli import run
from tests.test_end_to_end import quickly, two_classifiers, weights_of
from tests.test_pages import is_sound
from tests.test_task_runs import CASES, checkpoint


def rows_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


def average(folder: Path, one: Path, two: Path) -> Path:
    """A merge by hand: the first checkpoint with the mean of both checkpoints' tensors."""
    shutil.copytree(one, folder, ignore=shutil.ignore_patterns("fisher"))
    states = [weights_of(part) for part in (one, two)]
    save_file(
        {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def pair(work: Path, name: str, rows: str) -> tuple[Path, Path, Path]:
    """A recipe of two checkpoints of any task with data for both, and their merge by hand."""
    one, data = checkpoint(work / "one", name, rows)
    two, _ = checkpoint(work / "two", name, rows, seed=1)
    other = work / "two" / "data.jsonl"
    recipe = work / "recipe.yml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n"
        f"  - {{model: {one}, fisher: {{eval: {data}}}, parameters: {{weight: 1.0}}}}\n"
        f"  - {{model: {two}, fisher: {{eval: {other}}}, parameters: {{weight: 1.0}}}}\n"
    )
    return recipe, average(work / "merged", one, two), data


def evaluated(recipe: Path, *arguments: str | Path) -> dict[str, Any]:
    out = recipe.parent / "out.json"
    run("evaluate", recipe, *arguments, "--json", out)
    return json.loads(out.read_text())


def value(found: dict[str, Any], task: int, metric: str, line: str) -> float:
    return found["tasks"][task]["scores"][metric][line]["value"]


@pytest.fixture
def classifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classifiers with unlike heads, measured and merged by two recipes; returns the first recipe."""
    monkeypatch.chdir(tmp_path)
    work, two, three = two_classifiers(tmp_path)
    data = [word for folder in (two, three) for word in ("--data", f"{folder}.jsonl")]
    drafted = quickly("mergekit-fisher", "init", two, three, *data)
    for folder in (two, three):
        quickly("mergekit-fisher", "compute", folder, "--data", f"{folder}.jsonl")
        old = f'fisher: {{data: "{folder}.jsonl"}}'
        assert drafted.count(old) == 1
        drafted = drafted.replace(old, f"fisher: {{eval: {folder}.jsonl}}")
    for name, method in (("fisher", "fisher_mask"), ("average", "linear")):
        recipe = work / f"{name}.yml"
        recipe.write_text(drafted.replace("merge_method: fisher_mask", f"merge_method: {method}"))
        quickly("mergekit-yaml", recipe, work / "merged" / name)
    return work / "fisher.yml"


def test_evaluate_is_a_loop_by_hand(classifiers: Path) -> None:
    work = classifiers.parent
    merged = [work / "merged" / name for name in ("average", "fisher")]
    found = evaluated(classifiers, *merged, "--metric", "accuracy,loss", "--batch-size", "5")
    assert found["merges"] == ["average", "fisher"]
    assert [(task["task"], task["rows"]) for task in found["tasks"]] == [("two", 24), ("three", 24)]
    for name, line in (("average", "average"), ("fisher", "fisher"), (None, OWN)):
        if name:
            quickly("mergekit-fisher", "heads", classifiers, work / "merged" / name, work / "tasks" / name)
        for place, task in enumerate(("two", "three")):
            folder = work / "tasks" / name / task if name else work / task
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            tokenizer, hits, losses = AutoTokenizer.from_pretrained(folder), [], []
            for row in rows_of(work / f"{task}.jsonl"):
                with torch.no_grad():
                    logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
                hits.append(int(logits.argmax()) == row["label"])
                losses.append(float(-logits.log_softmax(-1)[row["label"]]))
            assert value(found, place, "accuracy", line) == pytest.approx(sum(hits) / 24)
            assert value(found, place, "loss", line) == pytest.approx(sum(losses) / 24, rel=1e-5)
            if name:
                ratio = value(found, place, "accuracy", line) / value(found, place, "accuracy", OWN)
                assert found["tasks"][place]["normalised"][line]["value"] == pytest.approx(100 * ratio)
    both = [task["normalised"]["fisher"]["value"] for task in found["tasks"]]
    assert found["mean"]["normalised"]["fisher"]["value"] == pytest.approx(sum(both) / 2)
    assert found["median"]["normalised"]["fisher"]["value"] == pytest.approx(float(numpy.median(both)))
    (difference,) = found["differences"]
    assert (difference["merge"], difference["minus"]) == ("fisher", "average")
    gain = value(found, 0, "accuracy", "fisher") - value(found, 0, "accuracy", "average")
    assert difference["tasks"]["two"]["value"] == pytest.approx(gain)


def test_a_merge_can_be_called_like_the_fine_tuned_models_line(classifiers: Path) -> None:
    (classifiers.parent / "merged" / "average").rename(OWN)
    found = evaluated(classifiers, OWN, "--metric", "loss")
    assert found["merges"] == [f"./{OWN}"]
    scores = found["tasks"][0]["scores"]["loss"]
    assert scores[OWN]["value"] != scores[f"./{OWN}"]["value"]


def test_the_pooler_can_be_the_mean_of_all(classifiers: Path) -> None:
    work = classifiers.parent
    merged = work / "merged" / "average"
    found = evaluated(classifiers, merged, "--pooler", "average", "--metric", "loss")
    quickly("mergekit-fisher", "heads", classifiers, merged, work / "pooled", "--pooler", "average")
    folder = work / "pooled" / "three"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = [
        model(**tokenizer(row["text"], return_tensors="pt"), labels=torch.tensor([row["label"]])).loss.item()
        for row in rows_of(work / "three.jsonl")
    ]
    assert value(found, 1, "loss", "average") == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_what_is_printed_and_written(classifiers: Path) -> None:
    work = classifiers.parent
    merged = [work / "merged" / name for name in ("average", "fisher")]
    shown = run(
        "evaluate",
        classifiers,
        *merged,
        "--markdown",
        work / "out.md",
        "--html",
        work / "out.html",
        "--samples",
        "7",
    ).stdout
    assert (work / "out.md").read_text() == shown
    head, _, *rows = shown.splitlines()
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells == ["task", "metric", OWN, "average", "normalised", "fisher", "normalised"]
    assert [row.split()[1] for row in rows[:4]] == ["two", "three", "mean", "median"]
    assert f"Rows: 7 of {work / 'two.jsonl'} (two), 7 of" in shown
    assert "fisher minus average" in shown
    page = is_sound((work / "out.html").read_text())
    assert {"two", "three"} <= {text for _, text in page.all("h2")}
    assert all(
        cells[0] in [text for _, text in page.all("th")] for cells in (row.split()[1:] for row in rows[:4])
    )
    assert "a tie" in shown


def test_token_classification_by_hand(tmp_path: Path) -> None:
    recipe, merged, data = pair(tmp_path, "bert-tokens", "token-classification")
    found = evaluated(recipe, merged)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "one" / "model").eval()
    state = model.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for line in (OWN, "merged"):
        right = count = 0
        for row in rows_of(data):
            encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            said = model(**encoded).logits[0].argmax(-1).tolist()
            first = {word: place for place, word in reversed(list(enumerate(encoded.word_ids())))}
            right += sum(said[first[word]] == tag for word, tag in enumerate(row["ner_tags"]))
            count += len(row["ner_tags"])
        assert value(found, 0, "accuracy", line) == pytest.approx(right / count)
        encoder = {name: tensor for name, tensor in load_file(merged / "model.safetensors").items()
                   if not name.startswith("classifier")}  # fmt: skip
        model.load_state_dict(state | encoder)
    assert found["tasks"][0]["metrics"] == ["accuracy", "f1_macro"]


def test_a_language_model_is_taken_as_merged(tmp_path: Path) -> None:
    recipe, merged, data = pair(tmp_path, "llama-causal", "text")
    found = evaluated(recipe, merged, "--metric", "loss,perplexity,accuracy")
    for folder, line in ((tmp_path / "one" / "model", OWN), (merged, "merged")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer, total, count, right = AutoTokenizer.from_pretrained(folder), 0.0, 0, 0
        for row in rows_of(data):
            ids = tokenizer(row["text"], return_tensors="pt").input_ids
            logits = model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            right += int((logits.argmax(-1) == ids[0, 1:]).sum())
            count += ids.shape[1] - 1
        assert value(found, 0, "loss", line) == pytest.approx(total / count, rel=1e-5)
        assert value(found, 0, "perplexity", line) == pytest.approx(numpy.exp(total / count), rel=1e-5)
        assert value(found, 0, "accuracy", line) == pytest.approx(right / count)
    own, other = value(found, 0, "loss", OWN), value(found, 0, "loss", "merged")
    assert found["tasks"][0]["normalised"]["merged"]["value"] == pytest.approx(100 * own / other)


def test_exact_match_is_what_greedy_decoding_gives(tmp_path: Path) -> None:
    recipe, merged, data = pair(tmp_path, "gpt2-causal", "completion")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    rows = rows_of(data)
    for row in rows[:5]:  # A completion that the model itself would give, one token long, then not its end.
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids[:, :-1]
        row["completion"] = tokenizer.decode(model(ids).logits[0, -1].argmax())
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    hits = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids[:, :-1]
        wanted = [*tokenizer(row["completion"], add_special_tokens=False).input_ids]
        if tokenizer.eos_token_id is not None:
            wanted.append(tokenizer.eos_token_id)
        made = model.generate(ids, max_new_tokens=len(wanted), min_new_tokens=len(wanted), do_sample=False)
        hits.append(made[0, ids.shape[1] :].tolist() == wanted)
    assert sum(hits) >= 3
    found = evaluated(recipe, merged, "--metric", "exact_match")
    assert value(found, 0, "exact_match", OWN) == pytest.approx(sum(hits) / len(rows))


def test_answers_by_hand(tmp_path: Path) -> None:
    recipe, merged, data = pair(tmp_path, "bert-answers", "question-answering")
    rows = rows_of(data)
    for row in rows:  # Every question has an answer, so none is none.
        row["answers"] = {"text": [row["context"].split()[0]] * 2, "answer_start": [0, 0]}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(recipe, merged)
    folder = tmp_path / "one" / "model"
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)  # fmt: skip
    exact, f1 = [], []
    for row in rows:
        encoded = tokenizer(row["question"], row["context"], return_tensors="pt")
        output = model(**encoded)
        words, first = row["context"].split(), encoded.sequence_ids().index(1)
        begin, end = (
            logits[0, first : first + len(words)].tolist()
            for logits in (output.start_logits, output.end_logits)
        )
        spans = [(begin[i] + end[j], i, j) for i in range(len(words)) for j in range(i, len(words))]
        _, i, j = max(spans)
        said, wanted = words[i : j + 1], row["answers"]["text"][0]
        exact.append(said == [wanted])
        f1.append(2 / (len(said) + 1) if wanted in said else 0)
    assert value(found, 0, "exact_match", OWN) == pytest.approx(sum(exact) / len(rows))
    assert value(found, 0, "f1", OWN) == pytest.approx(sum(f1) / len(rows))


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_every_task_is_scored(tmp_path: Path, name: str, rows: str) -> None:
    recipe, merged, _ = pair(tmp_path, name, rows)
    found = evaluated(recipe, merged)
    for task in found["tasks"]:
        assert task["rows"] == 8
        for metric in task["metrics"]:
            assert set(task["scores"][metric]) == {OWN, "merged"}
    # Batches and their padding change nothing.
    one_by_one = evaluated(recipe, merged, "--batch-size", "1", "--force")
    for place, task in enumerate(found["tasks"]):
        for metric in task["metrics"]:
            for line in (OWN, "merged"):
                assert value(one_by_one, place, metric, line) == pytest.approx(
                    value(found, place, metric, line),
                    rel=1e-4,
                    abs=1e-4,  # Correlations may be about 0.
                )


def test_a_second_call_runs_no_model(classifiers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = classifiers.parent
    merged = [work / "merged" / name for name in ("average", "fisher")]
    loaded: list[str] = []
    load = running.load_model

    def counted(*given: Any) -> Any:
        loaded.append(given[0].name)
        return load(*given)

    monkeypatch.setattr(running, "load_model", counted)
    first = evaluated(classifiers, *merged)
    assert len(loaded) == 6
    assert evaluated(classifiers, *merged) == first
    evaluated(classifiers, merged[1], "--metric", "f1_macro")
    # The same content elsewhere is the same.
    shutil.copytree(merged[0], work / "copy")
    assert value(evaluated(classifiers, work / "copy"), 0, "accuracy", "copy") == value(first, 0, "accuracy", "average")  # fmt: skip
    assert len(loaded) == 6
    # One value of one tensor changed.
    state = load_file(merged[0] / "model.safetensors")
    state["bert.encoder.layer.1.output.dense.bias"][3] += 1
    save_file(state, merged[0] / "model.safetensors", {"format": "pt"})
    evaluated(classifiers, *merged)
    assert len(loaded) == 8
    # Other rows; another configuration of one model; told to.
    data = work / "two.jsonl"
    data.write_text(data.read_text().replace('"label": 1', '"label": 0', 1))
    evaluated(classifiers, *merged)
    assert len(loaded) == 11
    config = json.loads((work / "three" / "config.json").read_text())
    (work / "three" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    evaluated(classifiers, *merged)
    assert len(loaded) == 14
    evaluated(classifiers, *merged, "--force")
    assert len(loaded) == 20


def test_merges_in_memory_that_differ_in_their_configuration_do_not_share_predictions(tmp_path: Path) -> None:
    recipe, _, _ = pair(tmp_path, "llama-causal", "text")
    read = read_recipe(recipe)
    encoder, config = merge_in_memory(yaml.safe_load(recipe.read_text()), "merge")
    other = copy.deepcopy(config)
    other.rms_norm_eps = 1.0
    found = subjects(read, Options())

    def runs(*configs: Any) -> tuple[int, list[float]]:
        merges = [Merge(f"merge-{place}", encoder, config=one) for place, one in enumerate(configs)]
        done = running.evaluate(plan_merges(found, merges, Options()), torch.device("cpu"), progress)
        return done.runs, [done.results.tasks[0].normalised(one.line).estimate().value for one in merges]

    count, (one, two) = runs(config, other)
    assert count == 6
    assert one != two
    assert runs(other, config) == (0, [two, one])


def test_evaluation_settings_leave_a_sidecar_valid(tmp_path: Path) -> None:
    model, data = tiny.checkpoint(tmp_path / "model"), tiny.write_data(tmp_path / "data.jsonl")
    recipe = tmp_path / "recipe.yml"
    text = f"merge_method: fisher_mask\nmodels: [{{model: {model}, fisher: {{data: {data}}}}}]\n"
    recipe.write_text(text)
    run("compute", recipe)
    recipe.write_text(text.replace("}}]", ", eval: other.jsonl, metric: [f1, accuracy]}}]"))
    assert "measured before" in run("compute", recipe).stdout


def test_the_validation_split_is_the_default(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "folder"
    rows = [rows_of(tiny.write_data(tmp_path / f"{seed}.jsonl", seed=seed)) for seed in (0, 1)]
    made = {
        name: datasets.Dataset.from_list(part)
        for name, part in zip(("train", "validation"), rows, strict=True)
    }
    datasets.DatasetDict(made).save_to_disk(folder)
    model = tiny.checkpoint(tmp_path / "model")
    recipe = tmp_path / "recipe.yml"
    text = f"merge_method: linear\nmodels: [{{model: {model}, fisher: {{data: DATA}}, parameters: {{weight: 1}}}}]\n"
    found = []
    for data in (
        folder,
        f"{folder}::train",
        f"{tmp_path / '0.jsonl'}, eval: {tmp_path / '1.jsonl'}",
        f"{tmp_path / '0.jsonl'}, eval: {folder}",
    ):
        recipe.write_text(text.replace("DATA", f"{data}"))
        found.append(evaluated(recipe, model, "--metric", "loss")["tasks"][0]["scores"]["loss"][OWN])
    assert found[0] == found[1] == found[2] == found[3]
    recipe.write_text(text.replace("DATA", f"{folder}, eval: '{folder}::train'"))
    assert evaluated(recipe, model, "--metric", "loss")["tasks"][0]["scores"]["loss"][OWN] != found[0]


def refused(recipe: Path, *arguments: str | Path) -> str:
    result = run("evaluate", recipe, *arguments, code=1)
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def test_a_merge_that_is_none_of_the_models_is_an_error(classifiers: Path) -> None:
    merged = classifiers.parent / "merged" / "average"
    assert "a merged folder is named twice" in refused(classifiers, merged, f"{merged}/")
    state = load_file(merged / "model.safetensors")
    missing = "bert.encoder.layer.1.output.dense.bias"
    save_file(
        {k: v for k, v in state.items() if k != missing}, merged / "model.safetensors", {"format": "pt"}
    )
    said = refused(classifiers, merged)
    assert (
        f"is not a merge of {classifiers.parent / 'two'}: {missing}: expected (32,), got no such tensor"
        in said
    )
    assert "there is no folder" in refused(classifiers, classifiers.parent / "nowhere")


def test_missing_heads_are_an_error(classifiers: Path) -> None:
    work = classifiers.parent
    state = load_file(work / "three" / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(kept, work / "three" / "model.safetensors", {"format": "pt"})
    said = refused(classifiers, work / "merged" / "average")
    assert f"{work / 'three'} has no classifier.bias, classifier.weight: it is not a complete" in said
    config = json.loads((work / "two" / "config.json").read_text())
    (work / "two" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert "is a BertModel, which does not tell what it predicts" in refused(
        classifiers, work / "merged" / "average"
    )


def test_data_that_does_not_fit_is_an_error(classifiers: Path) -> None:
    work, merged = classifiers.parent, classifiers.parent / "merged" / "average"
    data, text = work / "two.jsonl", classifiers.read_text()
    good = data.read_text()
    data.write_text(good.replace('"label": 1', '"label": 7', 1))
    assert "label 7 has no counterpart among the checkpoint's labels" in refused(classifiers, merged)
    data.write_text("")
    assert f"data '{data}' has no rows" in refused(classifiers, merged)
    data.write_text(good)
    classifiers.write_text(text.replace("two.jsonl", "none.jsonl"))
    assert f"there is no data file {work / 'none.jsonl'}" in refused(classifiers, merged)
    classifiers.write_text(text.replace(f"eval: {data}", f"data: {data}"))
    said = refused(classifiers, merged)
    assert (
        f"data '{data}' is one local table and has no split validation; say what to evaluate on: fisher: {{eval: FILE}}"
        in said
    )
    classifiers.write_text(text.replace(f"        fisher: {{eval: {data}}}\n", ""))
    assert (
        f"nothing says what to evaluate {work / 'two'} on; add fisher: {{eval: DATASET}} beside it"
        in refused(classifiers, merged)
    )
    classifiers.write_text(text.replace("eval: ", "evals: "))
    assert "unknown key 'evals'; known keys: data" in refused(classifiers, merged)
    assert "dtype, kind, eval, metric" in refused(classifiers, merged)


def test_a_split_that_is_not_there_is_an_error(classifiers: Path) -> None:
    import datasets

    work = classifiers.parent
    folder = work / "folder"
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows_of(work / "two.jsonl"))).save_to_disk(folder)
    text = classifiers.read_text()
    classifiers.write_text(text.replace(f"eval: {work / 'two.jsonl'}", f"data: {folder}"))
    said = refused(classifiers, work / "merged" / "average")
    assert f"cannot load data '{folder}' (split validation)" in said
    assert "say what to evaluate on: fisher: {eval: PATH:CONFIG:SPLIT}" in said
    classifiers.write_text(text.replace(f"eval: {work / 'two.jsonl'}", f"eval: '{folder}::test'"))
    assert "(split test)" in refused(classifiers, work / "merged" / "average")


def test_options_that_do_not_fit_are_an_error(classifiers: Path) -> None:
    merged = classifiers.parent / "merged" / "average"
    assert "metric 'pearsonr' does not fit" in refused(classifiers, merged, "--metric", "pearsonr")
    assert "three (sequence-classification, 3 labels)" in refused(classifiers, merged, "--metric", "f1")
    assert "cannot write there/out.json: its folder does not exist" in refused(
        classifiers, merged, "--json", "there/out.json"
    )
    assert "it is a folder" in refused(classifiers, merged, "--markdown", ".")
    assert "device 'tpu9' cannot be used" in refused(classifiers, merged, "--device", "tpu9")


def test_a_merge_for_another_task_is_an_error(tmp_path: Path) -> None:
    recipe, _, _ = pair(tmp_path, "llama-causal", "text")
    other = tiny.checkpoint(tmp_path / "other", "llama")
    assert "made for sequence-classification, not for causal-lm" in refused(recipe, other)


def test_what_was_cut_is_said_every_time(tmp_path: Path) -> None:
    recipe, merged, _ = pair(tmp_path, "llama-causal", "text")
    recipe.write_text(recipe.read_text() + "fisher: {max_length: 3}\n")
    for _ in range(2):
        assert "of 8 samples were too long and were truncated" in run("evaluate", recipe, merged).stderr


def test_damaged_predictions_are_as_good_as_none(tmp_path: Path) -> None:
    path, numbers = tmp_path / "some.npz", numpy.arange(40)
    save_predictions(Predictions(40, numbers, numbers % 3, numbers % 2, numbers / 7), path)
    whole, damaged = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        damaged += load_predictions(path) is None
    assert damaged > len(whole) / 2


def test_a_cache_that_cannot_be_written_is_said(classifiers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = classifiers.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("FISHER_MASK_CACHE", str(blocked))
    result = run("evaluate", classifiers, classifiers.parent / "merged" / "average")
    assert "cannot keep the predictions in" in result.stderr
    assert "| mean" in result.stdout
