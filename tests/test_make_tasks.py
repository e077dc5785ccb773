import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import benchmark


def test_the_labels_follow_from_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tasks = benchmark("make_tasks")
    monkeypatch.setattr(make_tasks, "SIZES", {"train": 40, "validation": 10})
    texts = {f"query {number} of {number % 4}": number % 4 for number in range(60)}
    sentences = [f"We saw {number} good things there." for number in range(60)]
    for split in make_tasks.SIZES:
        for name, rows in {
            "banking77": [{"sentence1": text, "label": label} for text, label in texts.items()],
            "mnli_subset": [{"sentence1": "", "sentence2": text, "label": 0} for text in sentences],
        }.items():
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(
                "".join(f"{json.dumps(row)}\n" for row in rows)
            )
    for out in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["make_tasks", str(tmp_path / "data"), str(tmp_path / out)])
        make_tasks.main()
    made = {
        file.relative_to(tmp_path / "one"): file.read_text() for file in (tmp_path / "one").rglob("*.json*")
    }
    assert {path: (tmp_path / "two" / path).read_text() for path in made} == made
    pairs = make_tasks.read(tmp_path / "one" / "same_intent" / "train.jsonl")
    assert len(pairs) == 40
    assert all((texts[row["sentence1"]] == texts[row["sentence2"]]) == row["label"] for row in pairs)
    ordered = make_tasks.read(tmp_path / "one" / "word_order" / "train.jsonl")
    assert all((row["sentence1"] in sentences) == (row["label"] == 0) for row in ordered)
    assert all(sorted(row["sentence1"].split())[0].isdigit() for row in ordered)
    assert [sum(row["label"] for row in rows) for rows in (pairs, ordered)] == [20, 20]
