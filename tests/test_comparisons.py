"""The benchmarks that compare merges, whole, on tiny models."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from fisher_mask_mergekit.opening import read_any
from tests import tiny
from tests.benchmarks import benchmark
from tests.test_cli import run
from tests.test_end_to_end import quickly

WAYS = [
    "average", "masks, normalize model", "columns", "all", "diagonal", "masks, prior 1", "masks, prior 3", "all, prior 1",
    "all, prior 3", "diagonal, prior 1", "task_arithmetic 0.4", "task_arithmetic 0.7", "ties", "dare_ties",
]  # fmt: skip


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of three siblings with two, two and three labels, and their parent."""
    monkeypatch.chdir(tmp_path)
    first = tiny.checkpoint(tmp_path / "first")
    parent = AutoModel.from_pretrained(first)
    parent.save_pretrained(tmp_path / "parent")
    entries = []
    for seed, (name, labels) in enumerate({"a": 2, "b": 2, "c": 3}.items()):
        tiny.sibling(tmp_path / name, first, seed, labels)
        tiny.write_data(tmp_path / f"{name}.jsonl", labels=labels, seed=seed)
        tiny.write_data(tmp_path / f"{name}-validation.jsonl", labels=labels, seed=seed + 10)
        entries.append(
            f"  - {{model: {name}, fisher: {{data: {name}.jsonl, eval: {name}-validation.jsonl}}}}\n"
        )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: fisher_mask\nmodels:\n{''.join(entries)}fisher: {{samples: 8}}\n")
    return recipe


def script(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "recipe.yml", "--device", "cpu", *arguments])
    benchmark(name).main()


def values(results: dict[str, Any], line: str) -> list[float]:
    return [task["normalised"][line]["value"] for task in results["tasks"]]


def test_many_is_what_the_commands_give(
    three: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--work", "work", "--parent", "parent", "--counts", "2:3,3"]
    script("many", *many, monkeypatch=monkeypatch)
    whole = json.loads(Path("work/many.json").read_text())
    (found,) = whole["runs"]
    assert {count: len(groups) for count, groups in found["records"].items()} == {"2": 3, "3": 1}
    assert all(group["results"]["merges"] == WAYS for groups in found["records"].values() for group in groups)
    table = Path("work/many.md").read_text()
    assert all(table.count(f"| {way} ") == 2 for way in WAYS)
    assert Path("work/many.png").stat().st_size > 10_000
    # The merge of b and c, by the commands.
    Path("bc.yml").write_text(
        quickly("mergekit-fisher", "init", "b", "c", "--data", "b.jsonl", "--data", "c.jsonl")
        .replace("samples: 128", "samples: 8")
        .replace('b.jsonl"', 'b.jsonl", eval: b-validation.jsonl')
        .replace('c.jsonl"', 'c.jsonl", eval: c-validation.jsonl')
    )
    Path("linear.yml").write_text(Path("bc.yml").read_text().replace("fisher_mask", "linear"))
    classifier = AutoModelForSequenceClassification.from_pretrained("parent")
    classifier.save_pretrained("classifier")
    Path("sum.yml").write_text(
        quickly("mergekit-fisher", "init", "b", "c", "--parent", "classifier")
        .replace("samples: 128", "samples: 8")
        .replace("nodes: columns, ", "")
        .replace(", clip: true", "")
    )
    quickly("mergekit-fisher", "compute", "bc.yml")
    with Path("bc.yml").open("a") as file:
        file.write("parameters: {normalize: model}\n")
    for recipe, merged in (("bc.yml", "fisher"), ("linear.yml", "average"), ("sum.yml", "sum")):
        quickly("mergekit-yaml", recipe, merged)
    run("evaluate", "bc.yml", "average", "fisher", "sum", "--json", "out.json")
    wanted = json.loads(Path("out.json").read_text())
    (group,) = (one for one in found["records"]["2"] if one["models"] == ["b", "c"])
    assert values(group["results"], "average") == pytest.approx(values(wanted, "average"), abs=1e-4)
    for way, merged in (("masks, normalize model", "fisher"), ("masks, prior 1", "sum")):
        assert values(group["results"], way) == pytest.approx(values(wanted, merged), abs=1e-4)
    # Once more: nothing is done again, and the same is written.
    before = {path: path.stat().st_mtime_ns for path in Path("work/results").iterdir()}
    capsys.readouterr()
    script("many", *many, monkeypatch=monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in Path("work/results").iterdir()} == before
    assert json.loads(Path("work/many.json").read_text()) == whole
    assert capsys.readouterr().out == table
    # With the pairs of a run of before.
    Path("before.json").write_text(json.dumps({"runs": [{"records": {"2": found["records"]["2"][:1]}}]}))
    script("many", *many, "--add", "before.json", monkeypatch=monkeypatch)
    text = Path("work/many.md").read_text()
    assert "2 models, 4 combinations:" in text
    assert "3 models, 1 combination:" in text
    assert "| merge                  | run 1 | run 2 |" in text


def test_clipped(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--work", "work", "--parent", "parent", "--counts", "2:1,3"]
    script("clipped", *options, monkeypatch=monkeypatch)
    (found,) = json.loads(Path("work/clipped.json").read_text())["runs"]
    free = [f"{way}, prior {prior}" for way in ("masks", "columns", "all") for prior in (1, 3)]
    for groups in found["records"].values():
        assert [group["results"]["merges"] for group in groups] == [
            ["average", *(name for way in free for name in (way, f"{way}, clip"))]
        ]
    assert "Clipped, 3 models, 1 combination:" in Path("work/clipped.md").read_text()
    assert [way.parameters.get("clip", False) for way in benchmark("clipped").WAYS[1:]] == [False, True] * 6


def test_regmean(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script("regmean", "--work", "work", "--parent", "parent", monkeypatch=monkeypatch)
    (run,) = json.loads(Path("work/regmean.json").read_text())["runs"]
    found = run["records"]
    assert [one["models"] for one in found] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert found[0]["results"]["merges"] == ["average", "regmean", "all", "columns, prior 1", "all, prior 1"]
    assert "RegMean, 3 pairs:" in Path("work/regmean.md").read_text()
    Path("work/regmean.json").rename("before.json")
    arguments = ["--work", "work", "--parent", "parent", "--models", "a,b", "--add", "before.json"]
    script("regmean", *arguments, monkeypatch=monkeypatch)
    assert [len(run["records"]) for run in json.loads(Path("work/regmean.json").read_text())["runs"]] == [
        3,
        1,
    ]
    assert "RegMean, 4 pairs:" in Path("work/regmean.md").read_text()
    for wrong in ("recipe.yml", "nowhere.json"):
        with pytest.raises(SystemExit):
            script("regmean", *arguments[:-1], wrong, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="needs --parent"):
        script("regmean", "--work", "work", monkeypatch=monkeypatch)


def test_regmean_is_the_least_squares_solution() -> None:
    regmean = benchmark("regmean")
    torch.manual_seed(0)
    inputs = [torch.randn(50, 4, dtype=torch.float64) for _ in range(2)]
    weights = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    products = [one.T @ one for one in inputs]
    outputs = [one @ weight.T for one, weight in zip(inputs, weights, strict=True)]
    best = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regmean, "OFF_DIAGONAL", 1.0)
        assert_close(regmean.regression_mean(products, weights), best)
    # Of one model it is that model's own matrix, whatever the inner products are.
    assert_close(regmean.regression_mean(products[:1], weights[:1]), weights[0])
    shrunk = regmean.regression_mean(products, weights)
    by_hand = [0.9 * one + 0.1 * torch.diag(one.diag()) for one in products]
    wanted = (weights[0] @ by_hand[0] + weights[1] @ by_hand[1]) @ torch.linalg.inv(by_hand[0] + by_hand[1])
    assert_close(shrunk, wanted)


def test_how_many_samples(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = benchmark("samples")
    monkeypatch.setattr(samples, "COUNTS", (1, 4))
    monkeypatch.setattr(samples, "SOME", (4,))
    monkeypatch.setattr(samples, "SEEDS", (0, 1))
    arguments = ["--work", "work", "--parent", "parent", "--models", "a,b"]
    script("samples", *arguments, monkeypatch=monkeypatch)
    (group,) = json.loads(Path("work/samples.json").read_text())["records"]
    assert len(group["results"]["merges"]) == 1 + 2 * 2 * (2 + 1 + 1)
    text = Path("work/samples.md").read_text()
    for scheme in ("masks", "all, prior 1"):
        assert f"{scheme}: 1 pairs, 2 seeds; averaging has a mean of " in text
    assert [text.count(f"| {source} ") for source in ("labelled", "unlabelled", "random tokens")] == [4, 2, 2]
    assert Path("work/samples.png").stat().st_size > 10_000
    # Other seeds draw other samples and other tokens.
    sidecars = [read_any(path).metadata.settings for path in Path("work/sidecars/a").iterdir()]
    drawn = {(one.kind, one.data, one.labels, one.samples, one.seed) for one in sidecars}
    assert len(drawn) == len(sidecars) == 2 * 2 * (2 + 1 + 1)


def test_what_tuning_adds(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the loss, which every change of a lambda moves.
    three.write_text(three.read_text().replace("samples: 8", "samples: 8, metric: [loss, accuracy]"))
    arguments = ["--work", "work", "--parent", "parent", "--pairs", "1", "--held-back", "4"]
    script("tuned", *arguments, "--trials", "6", monkeypatch=monkeypatch)
    (group,) = json.loads(Path("work/tuned.json").read_text())["records"]
    ways = {"average": "linear", "masks, prior 1": "fisher_mask", "all, prior 1": "fisher_mask"}
    assert group["results"]["merges"] == [name for way in ways for name in (way, f"{way}, tuned")]
    text = Path("work/tuned.md").read_text()
    assert "Tuned by 6 trials on 4 rows of each model's training data, 1 pair:" in text
    assert "Tuned minus as it is, mean normalised score of 1 pair:" in text
    kept = {}
    for folder in sorted(Path("work/tuned").iterdir()):
        recipe = yaml.safe_load((folder / "recipe.yml").read_text())
        parameters = recipe.get("parameters") or {}
        name = (
            "average"
            if recipe["merge_method"] == "linear"
            else f"{'all' if 'nodes' in parameters else 'masks'}, prior 1"
        )
        kept[name] = folder
    assert kept.keys() == ways.keys()
    moved = 0
    for name, folder in kept.items():
        # What the table has is the merge of the recipe that is kept, by the commands.
        quickly("mergekit-yaml", folder / "tuned.yml", folder / "merged")
        run("evaluate", folder / "recipe.yml", folder / "merged", "--json", "out.json")
        wanted = json.loads(Path("out.json").read_text())
        assert values(group["results"], f"{name}, tuned") == pytest.approx(values(wanted, "merged"), abs=1e-4)
        # And that the search with these options comes to: the command takes the trials for its own.
        told = run("tune", folder / "recipe.yml", folder / "tuned.yml", "--trials", "6", "--samples", "4")
        trials = json.loads((folder / "tuned.trials.json").read_text())["trials"]
        best = max(trials, key=lambda trial: trial["value"])
        assert f"trial {best['number']}, the best of 6" in told.stdout
        moved += best["number"] > 0
    assert moved
    # Other trials, rows to try on, or a dtype are other results, in the same folder.
    changed = (
        ["--trials", "2"],
        ["--trials", "6", "--held-back", "5"],
        ["--trials", "6", "--dtype", "bfloat16"],
    )
    for count, options in enumerate(changed, 2):
        script("tuned", *arguments, *options, monkeypatch=monkeypatch)
        assert len(list(Path("work/results").iterdir())) == count
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    Path("a.jsonl").write_text(
        "".join(json.dumps(row | {"text": f"w7 {row['text']}"}) + "\n" for row in rows)
    )
    script("tuned", *arguments, "--trials", "6", monkeypatch=monkeypatch)
    assert len(list(Path("work/results").iterdir())) == 2 + len(changed)
    for wrong in (["--trials", "0"], ["--pooler", "average"]):
        with pytest.raises(SystemExit):
            script("tuned", *arguments, *wrong, monkeypatch=monkeypatch)


def test_the_papers_tables(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper = benchmark("paper")
    monkeypatch.setattr(paper, "COSTED", 8)
    script("paper", "--work", "work", "--samples", "4,8", "--pooler", "average", monkeypatch=monkeypatch)
    found = json.loads(Path("work/paper.json").read_text())
    assert [one["models"] for one in found["records"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert len(found["records"][0]["results"]["merges"]) == 1 + 3 * 2
    text = Path("work/paper.md").read_text()
    assert [text.count(title) for title in ("Table 1, 3 pairs:", "Table 2:", "Tables 3 and 4")] == [1, 1, 1]
    costs = found["costs"]
    for model in "abc":
        mask, full, released = (
            costs[f"{way}, 8"][model] for way in ("mask Fisher", "full Fisher", "mask Fisher, released code")
        )
        assert min(mask["seconds"] + full["seconds"] + released["seconds"]) > 0
        # Two labels or three, and the weights' own gradients.
        assert full["gflops"] > 1.5 * mask["gflops"]


def test_published_figures_stand_beside_the_papers_own_checkpoints() -> None:
    paper = benchmark("paper")
    ways = paper.ways_of([128, 2048, 32768])
    named = {way.name: paper.published("bert-base", way.name) for way in ways}
    assert named["average"] == "91.2"
    assert named["full Fisher, 2,048"] == "91.7"
    assert named["mask Fisher, released code, 32,768"] == "93.7"
    assert named["mask Fisher, 128"] == ""
    assert {paper.published("encoders", way.name) for way in ways} == {""}


def test_choices(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = benchmark("choices")
    monkeypatch.setattr(choices, "FEW", 2)
    monkeypatch.setattr(choices, "CHANGED", {"mask_placement pre": {"mask_placement": "pre"}})
    monkeypatch.setattr(choices, "CROSSED", ())
    lines = three.read_text().splitlines(keepends=True)
    others = ("  - {model: a", "  - {model: b")
    Path("short.yml").write_text("".join(line for line in lines if not line.startswith(others)))
    arguments = ["--work", "work", "--short", "short.yml", "--models", "a,b"]
    script("choices", *arguments, monkeypatch=monkeypatch)
    records = json.loads(Path("work/choices.json").read_text())["records"]
    counts = {title: [one["models"] for one in found] for title, found in records.items()}
    assert list(counts.values()) == [[["a", "b"]], [["a", "b"], ["b", "a"]], [["c", "a"], ["c", "b"]]]
    text = Path("work/choices.md").read_text()
    assert all(text.count(f"| normalize {kind}") == 3 for kind in ("none", "model", "layer"))
    assert text.count("mask_placement pre") == 2
    script("choices", *arguments, "--nodes", "all", "--parent", "parent", monkeypatch=monkeypatch)
    records = json.loads(Path("work/choices-all.json").read_text())["records"]
    assert [len(found) for found in records.values()] == [1, 2, 2]
    assert all(title.startswith("Rows and columns: ") for title in records)
    merges = [found[0]["results"]["merges"] for found in records.values()]
    for way in ("columns", "all"):
        assert all(
            f"{way}, normalize {kind}" in one for kind in ("none", "model", "tensor") for one in merges
        )
    assert set(merges[0]) - set(merges[1]) == {
        *(f"all, prior {prior}" for prior in (0.3, 3, 10)),
        *(f"all, prior 1, {name}" for name in choices.CHANGED_ALL),
    }


def counted(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many files of results there are after one more run."""
    arguments = ["--work", "work", "--parent", "parent", "--counts", "2", "--models", "a,b"]
    script("many", *arguments, monkeypatch=monkeypatch)
    return len(list(Path("work/results").iterdir()))


def test_nothing_stale_is_served(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = benchmark("ways")
    many = benchmark("many")
    ties = ways.Way("ties", "ties", each={"weight": 1.0}, with_parent=True)
    monkeypatch.setattr(many, "WAYS", (ways.AVERAGE, ways.mask("fisher_mask"), ties))
    monkeypatch.setattr(many, "draw", lambda record, path: None)
    assert [counted(monkeypatch), counted(monkeypatch)] == [1, 1]
    three.write_text(three.read_text().replace("samples: 8", "samples: 8, metric: loss"))
    assert counted(monkeypatch) == 2
    tiny.write_data(Path("a.jsonl"), seed=99)
    assert counted(monkeypatch) == 3
    tiny.write_data(Path("a-validation.jsonl"), seed=98)
    assert counted(monkeypatch) == 4
    tiny.sibling(Path("b"), Path("first"), seed=97)
    compare = benchmark("compare")
    compare._weights.cache_clear()  # A run reads every checkpoint once.
    assert counted(monkeypatch) == 5
    AutoModel.from_pretrained("b").save_pretrained("parent")
    compare._weights.cache_clear()
    assert counted(monkeypatch) == 6


def test_two_runs_may_share_a_work_folder(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes the same copies with another head while this one does."""
    save = BertForSequenceClassification.save_pretrained
    places: list[Path] = []

    def both(self: BertForSequenceClassification, folder: Path) -> None:
        places.append(folder)
        save(self, folder)
        shutil.copytree(folder, Path("work/same-head") / Path(folder).name.split("-")[0].lstrip("."))

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", both)
    assert counted(monkeypatch) == 1
    assert places
    made = list(Path("work/same-head").iterdir())
    assert len(made) == len(places)
    assert all((folder / "model.safetensors").is_file() for folder in made)


def test_scores_that_are_not_defined_are_left_out() -> None:
    summary = benchmark("summary")
    results = []
    for value, difference, verdict in ((90.0, 2.0, "better"), (None, None, "n/a"), (80.0, -1.0, "a tie")):
        normalised = {"average": {"value": 88.0}, "other": {"value": value}}
        mean = {"value": difference, "verdict": verdict}
        differences = [{"merge": "other", "normalised_mean": mean}]
        tasks = [{"normalised": normalised}]
        results.append(
            {"results": {"merges": ["average", "other"], "tasks": tasks, "differences": differences}}
        )
    _, other = summary.summaries(results)
    assert (other.mean, other.worst, other.lowest, other.above, other.groups, other.better, other.worse) == (
        85, 80, -1, 1, 2, 1, 0,
    )  # fmt: skip


def test_attention_is_counted(three: Path) -> None:
    paper = benchmark("paper")
    model: Any = tiny.classifier("bert", attn_implementation="sdpa").eval()
    inputs = tiny.tokenizer()("w5 w6 w7", return_tensors="pt")
    flops = paper.count_flops(lambda: model(**inputs))
    assert flops["aten.bmm"] > 0
    assert flops["aten.addmm"] > 0


def test_a_model_that_is_not_there(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"recipe\.yml has no d; it has a, b, c"):
        script("many", "--work", "work", "--models", "a,d", monkeypatch=monkeypatch)


def test_fine_tuning_makes_a_classifier(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("data")
    folder.mkdir()
    for file in ("train.jsonl", "validation.jsonl"):
        rows = [
            json.loads(line) for line in tiny.write_data(folder / file, labels=3).read_text().splitlines()
        ]
        lines = [json.dumps({"sentence1": row["text"], "label": row["label"]}) for row in rows]
        (folder / file).write_text("\n".join(lines))
    (folder / "labels.json").write_text('["yes", "no", "maybe"]')
    tiny.tokenizer().save_pretrained("parent")
    names = ["--names", "yes,other,other", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["fine_tune", "parent", "data", "tuned", *names])
    benchmark("fine_tune").main()
    config = json.loads(Path("tuned/config.json").read_text())
    assert config["label2id"] == {"yes": 0, "other": 1}
