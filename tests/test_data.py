"""Data: names of data sets, columns, labels, the draw, and batches."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit.data import DataSpec, Samples, load_samples, parse_spec, token_batches
from fisher_mask_mergekit.errors import DataError
from fisher_mask_mergekit.settings import FisherSettings
from tests import tiny

GENERIC = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
NAMED = {"Negative": 0, "Positive": 1}


def draw(data: Path | str, label2id: dict[str, int] | None = None, **settings: Any) -> Samples:
    return load_samples(FisherSettings(data=str(data), **settings), label2id or GENERIC)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nyu-mll/glue:sst2", DataSpec("nyu-mll/glue", "sst2", "train", None)),
        ("nyu-mll/glue:sst2@abc", DataSpec("nyu-mll/glue", "sst2", "train", "abc")),
        (
            "nyu-mll/glue:mnli:validation_matched",
            DataSpec("nyu-mll/glue", "mnli", "validation_matched", None),
        ),
        ("imdb", DataSpec("imdb", None, "train", None)),
        ("imdb::test@v2", DataSpec("imdb", None, "test", "v2")),
    ],
)
def test_names_of_data_sets(text: str, wanted: DataSpec) -> None:
    assert parse_spec(text) == wanted


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = jsonl(tmp_path / "a:b@c.jsonl", {"text": "x", "label": 0})
    assert parse_spec(str(odd)) == DataSpec(str(odd), None, "train", None)
    assert draw(odd).texts == [("x",)]


def test_too_many_parts() -> None:
    with pytest.raises(DataError, match=r"'a:b:c:d' is not of the form path\[:config"):
        parse_spec("a:b:c:d")


def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"text": [f"w{i}" for i in range(9)], "label": [i % 3 for i in range(9)]}
    )
    table.to_json(tmp_path / "d.jsonl")
    table.to_csv(tmp_path / "d.csv")
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "dict")
    drawn = [draw(tmp_path / name, samples=5) for name in ("d.jsonl", "d.csv", "d.parquet", "plain", "dict")]
    assert all(one.texts == drawn[0].texts and one.labels == drawn[0].labels for one in drawn)
    assert all(one.record.digest == drawn[0].record.digest for one in drawn)
    assert draw(f"{tmp_path / 'dict'}::test").record.rows == 1


def test_the_draw_is_seeded_and_without_replacement(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *({"text": f"w{i}", "label": 0} for i in range(50)))
    first = draw(data, samples=30)
    assert len(set(first.texts)) == 30
    assert draw(data, samples=30).texts == first.texts
    assert draw(data, samples=30, seed=1).texts != first.texts
    assert draw(data, samples=10).texts == first.texts[:10]
    assert len(draw(data, samples=99).texts) == 50
    assert (first.record.rows, first.record.split) == (50, "train")


@pytest.mark.parametrize(
    "columns",
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
     ("text_a", "text_b"), ("sentence",), ("text",), ("sentence1",)],
)  # fmt: skip
def test_text_columns_by_convention(tmp_path: Path, columns: tuple[str, ...]) -> None:
    row = {"idx": 7, **{name: f"in {name}" for name in columns}, "label": 1}
    drawn = draw(jsonl(tmp_path / "d.jsonl", row))
    assert drawn.record.text == columns
    assert drawn.texts == [tuple(f"in {name}" for name in columns)]


def test_columns_by_option(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"a": "left", "b": "right", "gold": 2})
    drawn = draw(data, text=("b", "a"), label="gold")
    assert (drawn.texts, drawn.labels) == ([("right", "left")], [2])


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"body": "x", "label": 0},
            {},
            "no text column found in .*; its columns are body, label; name it with text",
        ),
        (
            {"text": "x", "y": 0},
            {},
            "no label column found in .*; its columns are text, y; name it with label",
        ),
        ({"text": "x", "label": 0}, {"text": "body"}, "has no column 'body'; its columns are text, label"),
        ({"text": 3, "label": 0}, {}, "column 'text' holds int, expected text"),
        (
            {"text": "x", "label": 7},
            {},
            r"label 7 has no counterpart among the checkpoint's labels \(LABEL_0=0",
        ),
        ({"text": "x", "label": -1}, {}, "1 of 1 drawn rows have label -1, that is, none"),
        ({"text": "x", "label": 0.5}, {}, "labels are neither whole numbers nor names: 0.5"),
        (
            {"text": "x", "label": "happy"},
            {},
            "label 'happy' has no counterpart .*; say which with label_map",
        ),
        ({"text": "x", "label": 0}, {"label_map": {"1": 0}}, "label 0 has no counterpart"),
        ({"text": "x", "label": 0}, {"label_map": {"0": "other"}}, "label 0 has no counterpart"),
        ({"text": "x", "label": 0}, {"label_map": {"0": 3}}, "label 0 has no counterpart"),
    ],
)
def test_unusable_data_says_what_is_wrong(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        draw(jsonl(tmp_path / "d.jsonl", row), **settings)


def test_no_rows_no_file_no_format_no_split(tmp_path: Path) -> None:
    empty = datasets.Dataset.from_dict({"text": [], "label": []})
    empty.to_parquet(tmp_path / "empty.parquet")
    empty.save_to_disk(tmp_path / "empty")
    datasets.DatasetDict({"train": empty}).save_to_disk(tmp_path / "dict")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    for name, message in {
        "empty.parquet": "has no rows",
        "empty.jsonl": "has no rows",
        "empty": "cannot load data",
        "header.csv": "has no rows",
        "nowhere.jsonl": "there is no data file",
        "notes.txt": "expected one of .jsonl, .json, .csv, .parquet",
        "broken.jsonl": "cannot load data",
        "dict::test": r"cannot load data .*\(split test\)",
    }.items():
        with pytest.raises(DataError, match=message):
            draw(tmp_path / name)


def class_labels(path: Path, names: list[str]) -> Path:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    table = {"text": [f"w{i}" for i in range(len(names))], "label": list(range(len(names)))}
    datasets.Dataset.from_dict(table, features).save_to_disk(path)
    return path


def by_text(drawn: Samples) -> dict[str, int]:
    return {text[0]: label for text, label in zip(drawn.texts, drawn.labels, strict=True)}


def test_labels_match_by_name_where_both_have_names(tmp_path: Path) -> None:
    data = class_labels(tmp_path / "d", ["positive", "negative"])
    assert by_text(draw(data, NAMED)) == {"w0": 1, "w1": 0}
    assert draw(data, NAMED).record.label_map == {"positive": 1, "negative": 0}
    strings = jsonl(
        tmp_path / "d.jsonl", {"text": "w0", "label": "POSITIVE"}, {"text": "w1", "label": "negative"}
    )
    assert by_text(draw(strings, NAMED)) == {"w0": 1, "w1": 0}
    spelled = jsonl(tmp_path / "e.jsonl", {"text": "w0", "label": "not_equivalent"})
    assert draw(spelled, {"Not-Equivalent": 0, "equivalent": 1}).labels == [0]


def test_a_name_that_looks_like_a_number_is_still_a_name(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"text": "w0", "label": "1"}, {"text": "w1", "label": "2"})
    assert by_text(draw(data, {"1": 0, "2": 1})) == {"w0": 0, "w1": 1}
    with pytest.raises(DataError, match="label '²' has no counterpart"):
        draw(jsonl(tmp_path / "e.jsonl", {"text": "w0", "label": "²"}))
    with pytest.raises(DataError, match="label 5 has no counterpart"):
        draw(jsonl(tmp_path / "f.jsonl", {"text": "w0", "label": 5}), {"a": 0, "b": 5})


def test_a_local_table_has_no_splits_or_revisions(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"text": "w0", "label": 0})
    for name in (f"{data}::test", f"{data}:config", f"{data}@v1"):
        with pytest.raises(DataError, match="is one local table"):
            draw(name)


def test_labels_match_by_index_where_one_has_no_names(tmp_path: Path) -> None:
    named = class_labels(tmp_path / "d", ["positive", "negative"])
    assert by_text(draw(named, GENERIC)) == {"w0": 0, "w1": 1}
    numbers = jsonl(tmp_path / "d.jsonl", {"text": "w0", "label": 1})
    assert draw(numbers, NAMED).labels == [1]
    digits = class_labels(tmp_path / "digits", ["0", "1"])
    assert by_text(draw(digits, NAMED)) == {"w0": 0, "w1": 1}


def test_an_explicit_map_beats_names_and_indices(tmp_path: Path) -> None:
    data = class_labels(tmp_path / "d", ["positive", "negative"])
    for label_map in ({"positive": 0, "negative": 1}, {0: "Negative", 1: "positive"}, {"0": "0", "1": "1"}):
        assert by_text(draw(data, NAMED, label_map=label_map)) == {"w0": 0, "w1": 1}


def test_batches_are_right_padded_truncated_and_by_length(tmp_path: Path) -> None:
    texts: list[tuple[str, ...]] = [("w5 w6",), ("w5 w6 w7 w8 w9 w10",), ("w5",)]
    record = draw(jsonl(tmp_path / "d.jsonl", {"text": "x", "label": 0})).record
    drawn = Samples(texts, [0, 1, 2], record)
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    made = list(
        token_batches(
            drawn, tokenizer, max_length=6, batch_size=2, by_length=True, device=torch.device("cpu")
        )
    )
    assert [batch.index for batch in made] == [(1, 0), (2,)]
    assert_close(made[0].inputs["input_ids"], torch.tensor([[2, 5, 6, 7, 8, 3], [2, 5, 6, 3, 0, 0]]))
    assert_close(made[0].inputs["attention_mask"], torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    assert_close(made[0].labels, torch.tensor([1, 0]))
    in_order = token_batches(
        drawn, tokenizer, max_length=6, batch_size=2, by_length=False, device=torch.device("cpu")
    )
    assert [batch.index for batch in in_order] == [(0, 1), (2,)]


def test_a_sample_without_tokens_is_an_error(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    drawn = draw(jsonl(tmp_path / "d.jsonl", {"text": "", "label": 0}))
    with pytest.raises(DataError, match=r"a sample has no tokens: \(''"):
        list(
            token_batches(
                drawn, tokenizer, max_length=6, batch_size=2, by_length=True, device=torch.device("cpu")
            )
        )


def test_pairs_are_encoded_as_pairs(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"premise": "w5", "hypothesis": "w6", "label": 0})
    (batch,) = token_batches(
        draw(data), tiny.tokenizer(), max_length=9, batch_size=2, by_length=True, device=torch.device("cpu")
    )
    assert_close(batch.inputs["input_ids"], torch.tensor([[2, 5, 3, 6, 3]]))
