"""Data: names of data sets, columns, labels, the draw, and batches."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.testing import assert_close

from fisher_mask_mergekit import labels
from fisher_mask_mergekit.batches import Limit, lacks_for_padding, padded_batches
from fisher_mask_mergekit.columns import LABEL_COLUMNS, TEXT_COLUMNS
from fisher_mask_mergekit.data import DataSpec, Samples, load_samples, parse_spec
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.errors import CheckpointError, DataError
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks import (
    IGNORED,
    Batch,
    CausalLM,
    MaskedLM,
    MultiLabelClassification,
    MultipleChoice,
    QuestionAnswering,
    Regression,
    Seq2SeqLM,
    SequenceClassification,
    Task,
    TokenClassification,
    Tokenization,
)
from tests import tiny

GENERIC = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
NAMED = {"Negative": 0, "Positive": 1}


def draw(data: Path | str, label2id: dict[str, int] | None = None, **settings: Any) -> Samples:
    return draw_for(SequenceClassification(label2id=label2id or GENERIC), data, **settings)


def draw_for(task: Task, data: Path | str, **settings: Any) -> Samples:
    return load_samples(FisherSettings(data=str(data), **settings), task)


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


def test_a_folder_with_a_sign_in_its_name_has_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": "w5", "label": 0}])
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "set@v1")
    for text, name in ((f"{tmp_path}/set@v1::test", "test"), (f"{tmp_path}/set@v1", "train")):
        assert parse_spec(text) == DataSpec(f"{tmp_path}/set@v1", None, name, None)
        assert draw(text).texts == [("w5",)]
    assert parse_spec(f"{tmp_path}/none@v1::test").path == f"{tmp_path}/none"


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


@pytest.mark.parametrize("folder", ["run[1]", "run?", "run*"])
def test_a_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    for name in (folder, "run1"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "d.jsonl", {"text": name, "label": 0})
    assert draw(tmp_path / folder / "d.jsonl").texts == [(folder,)]
    with pytest.raises(
        DataError, match="as a pattern, and read other folders that fit it; rename the folder"
    ):
        draw(tmp_path / folder)
    monkeypatch.chdir(tmp_path / folder)
    assert draw("d.jsonl").texts == [(folder,)]
    datasets.Dataset.from_list([{"text": "w5", "label": 0}]).save_to_disk("there")
    assert draw("there").texts == [("w5",)]


def test_the_draw_is_seeded_and_without_replacement(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *({"text": f"w{i}", "label": 0} for i in range(50)))
    first = draw(data, samples=30)
    assert len(set(first.texts)) == 30
    assert draw(data, samples=30).texts == first.texts
    assert draw(data, samples=30, seed=1).texts != first.texts
    assert draw(data, samples=10).texts == first.texts[:10]
    assert len(draw(data, samples=99).texts) == 50
    assert (first.record.rows, first.record.split) == (50, "train")


@pytest.mark.parametrize("columns", TEXT_COLUMNS)
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
            "no text column found in .*; its columns are body, label, looked for were .*, text, .*; name it with text",
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
        (
            {"text": "x", "label": 0},
            {"label_map": {"0": "other"}},
            "label 0 has no .*; label_map says 'other'",
        ),
        (
            {"text": "x", "label": 0},
            {"label_map": {"0": 3}},
            "label 0 has no counterpart .*; label_map says 3",
        ),
        (
            {"text": "x", "label": "happy"},
            {"label_map": {"hapy": 0, "sad": 1}},
            "label 'happy' has no .*; label_map has no key for it, and keys that no drawn row has: 'hapy', 'sad'",
        ),
        (
            {"text": "x", "label": 0},
            {"label_map": {"1": 0}},
            "label 0 has .* label_map has no key for it, and keys that no drawn row has: '1'",
        ),
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
        "empty": "cannot load data|has no rows",  # By the version of datasets.
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


def test_nulls_in_a_list_of_rows_are_no_rows(tmp_path: Path) -> None:
    rows: list[Any] = [{"tokens": ["w5", "w6"], "tags": [0, 1], "more": ["x", None]}] * 3
    data = tmp_path / "d.json"
    for indent in (None, 1):
        data.write_text(json.dumps(rows, indent=indent))
        assert len(draw_for(TokenClassification(label2id=TAGS), data).texts) == 3
        data.write_text(json.dumps([*rows[:2], None], indent=indent))
        with pytest.raises(DataError, match=r"d.json', row 3: expected a JSON object, got null"):
            draw_for(TokenClassification(label2id=TAGS), data)


def test_labels_of_two_kinds_are_kept_in_order() -> None:
    ids = {f"LABEL_{index}": index for index in range(11)}
    found = labels.match_labels([10, "2", 0, "1"], None, ids, FisherSettings())
    assert list(labels.label_map(found, None).items()) == [("0", 0), ("10", 10), ("1", 1), ("2", 2)]


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
    with pytest.raises(DataError, match=r"label_map has no key for it, and keys that .* has: 'negatve'$"):
        draw(data, NAMED, label_map={"positive": 0, "negatve": 1})
    with pytest.raises(DataError, match=r"label_map has no key for it$"):
        draw(data, NAMED, label_map={0: 0})


def batches(
    samples: Samples, task: Task, size: int = 2, *, max_length: int = 9, by_length: bool = True
) -> list[Batch]:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    encoded = encode_samples(samples, task, Tokenization(tokenizer, max_length))
    return list(
        padded_batches(
            encoded, tokenizer, limits=Limit(rows=size), by_length=by_length, device=torch.device("cpu")
        )
    )


def test_batches_are_right_padded_truncated_and_by_length(tmp_path: Path) -> None:
    texts: list[tuple[str, ...]] = [("w5 w6",), ("w5 w6 w7 w8 w9 w10",), ("w5",)]
    record = draw(jsonl(tmp_path / "d.jsonl", {"text": "x", "label": 0})).record
    drawn, task = Samples(texts, [0, 1, 2], record), SequenceClassification()
    made = batches(drawn, task, max_length=6)
    assert [batch.index for batch in made] == [(1, 0), (2,)]
    assert_close(made[0].inputs["input_ids"], torch.tensor([[2, 5, 6, 7, 8, 3], [2, 5, 6, 3, 0, 0]]))
    assert_close(made[0].inputs["attention_mask"], torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    assert_close(made[0].labels, torch.tensor([1, 0]))
    in_order = batches(drawn, task, max_length=6, by_length=False)
    assert [batch.index for batch in in_order] == [(0, 1), (2,)]
    encoded = encode_samples(drawn, task, Tokenization(tiny.tokenizer(), 6))
    assert (encoded.truncated, encoded.left_out) == (1, 0)
    assert encode_samples(drawn, task, Tokenization(tiny.tokenizer(), 8)).truncated == 0


def test_a_sample_without_tokens_is_an_error(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    drawn = draw(jsonl(tmp_path / "d.jsonl", {"text": "", "label": 0}))
    with pytest.raises(DataError, match=r"a sample has no tokens: \(''"):
        encode_samples(drawn, SequenceClassification(), Tokenization(tokenizer, 6))


def test_pairs_are_encoded_as_pairs(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"premise": "w5", "hypothesis": "w6", "label": 0})
    (batch,) = batches(draw(data), SequenceClassification())
    assert_close(batch.inputs["input_ids"], torch.tensor([[2, 5, 3, 6, 3]]))


def test_inputs_that_cannot_be_padded_are_an_error(tmp_path: Path) -> None:
    rows = [{"text": text, "label": 0} for text in ("w5", "w5 w6")]
    encoded = encode_samples(
        draw(jsonl(tmp_path / "d.jsonl", *rows)), SequenceClassification(), Tokenization(tiny.tokenizer(), 9)
    )
    for sample in encoded.samples.values():
        sample.inputs["entity_ids"] = sample.inputs["input_ids"]
    with pytest.raises(
        CheckpointError, match="tokenizer gives entity_ids, which cannot be padded; take batch_size 1"
    ):
        list(
            padded_batches(
                encoded, tiny.tokenizer(), limits=Limit(rows=2), by_length=True, device=torch.device("cpu")
            )
        )


def test_without_a_padding_token_or_a_mask_nothing_is_padded() -> None:
    tokenizer = tiny.tokenizer()
    assert lacks_for_padding(tokenizer) is None
    tokenizer.model_input_names = ["input_ids"]
    assert lacks_for_padding(tokenizer) == "attention mask"
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert lacks_for_padding(tokenizer) == "padding token"


TAGS = {"O": 0, "B-PER": 1, "I-PER": 2}
CHAT = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
SPAN = {"text": ["w7 w8"], "answer_start": [3]}
MULTI = MultiLabelClassification(label2id={"Joy": 0, "Fear": 1, "Rage": 2})


@pytest.mark.parametrize(
    ("task", "row", "columns", "text", "label"),
    [
        *((TokenClassification(label2id=TAGS), {words: ["w5", "w6"], tags: [0, 1]}, ((words,), tags), ("w5", "w6"), [0, 1])
          for words in ("tokens", "words") for tags in ("ner_tags", "pos_tags", "tags", "labels")),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5", "w6"], "tags": ["i-per", "O"]}, (("tokens",), "tags"), ("w5", "w6"), [2, 0]),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5", "w6"], "tags": [-100, 2]}, (("tokens",), "tags"), ("w5", "w6"), [IGNORED, 2]),
        (QuestionAnswering(), {"question": "w5", "context": "w6 w7 w8", "answers": SPAN}, (("question", "context"), "answers"), ("w5", "w6 w7 w8"), [3, 8]),
        (QuestionAnswering(), {"question": "w5", "context": "w6", "answers": {"text": [], "answer_start": []}}, (("question", "context"), "answers"), ("w5", "w6"), None),
        (MaskedLM(), {"text": "w5", "label": 1}, (("text",), None), ("w5",), None),
        (MaskedLM(), {"sentence": "w5"}, (("sentence",), None), ("w5",), None),
        (CausalLM(), {"text": "w5", "label": 1}, (("text",), None), ("w5",), None),
        (CausalLM(), {"content": "w5"}, (("content",), None), ("w5",), None),
        (CausalLM(), {"text": "w4", "prompt": "w5", "completion": "w6"}, (("prompt",), "completion"), ("w5",), "w6"),
        (CausalLM(), {"prompt": "w5", "response": "w6"}, (("prompt",), "response"), ("w5",), "w6"),
        (CausalLM(), {"messages": [*CHAT, CHAT[0]]}, (("messages",), None), (CHAT[0],), CHAT[1]),
        *((Seq2SeqLM(), {source: "w5", target: "w6"}, ((source,), target), ("w5",), "w6")
          for source, target in (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("source", "target"),
                                 ("input", "output"), ("question", "answer"), ("prompt", "completion"), ("text", "summary"),
                                 ("text", "target"), ("text", "label"))),
        *((MULTI, {"text": "w5", label: given}, (("text",), label), ("w5",), wanted)
          for label in LABEL_COLUMNS
          for given, wanted in (([0, 2], [1, 0, 1]), ([0, 0, 1], [0, 0, 1]), ([0.0, 1.0, 1.0], [0, 1, 1]), (["fear"], [0, 1, 0]), ([], [0, 0, 0]))),
        (MULTI, {"text": "w5", "rage": 1, "joy": 0, "fear": True}, (("text",), None), ("w5",), [0, 1, 1]),
        (Regression(label2id={"LABEL_0": 0}), {"sentence1": "w5", "sentence2": "w6", "label": 2.5}, (("sentence1", "sentence2"), "label"), ("w5", "w6"), [2.5]),
        (Regression(label2id={"a": 0, "b": 1}), {"text": "w5", "labels": [1, 2.5]}, (("text",), "labels"), ("w5",), [1.0, 2.5]),
        (MultipleChoice(), {"question": "w5", "choices": ["w6", "w7"], "answer": 1}, (("question", "choices"), "answer"), ("w5", "w6", "w7"), 1),
        (MultipleChoice(), {"question": "w5", "choices": ["w6", "w7"], "label": "B"}, (("question", "choices"), "label"), ("w5", "w6", "w7"), 1),
        (MultipleChoice(), {"question": "w5", "choices": {"text": ["w6", "w7"], "label": ["1", "2"]}, "answerKey": "2"}, (("question", "choices"), "answerKey"), ("w5", "w6", "w7"), 1),
        (MultipleChoice(), {"question": "w5", **{f"choice{i}": f"w{i}" for i in range(4)}, "label": 3}, (("question", "choice0", "choice1", "choice2", "choice3"), "label"), ("w5", "w0", "w1", "w2", "w3"), 3),
        (MultipleChoice(), {"sent1": "w5", "sent2": "w6", **{f"ending{i}": f"w{i}" for i in range(4)}, "label": 3}, (("sent1", "sent2", "ending0", "ending1", "ending2", "ending3"), "label"), ("w5", "w6 w0", "w6 w1", "w6 w2", "w6 w3"), 3),
    ],
)  # fmt: skip
def test_what_a_task_reads_by_convention(
    tmp_path: Path, task: Task, row: dict[str, Any], columns: Any, text: Any, label: Any
) -> None:
    drawn = draw_for(task, jsonl(tmp_path / "d.jsonl", row))
    assert (drawn.record.text, drawn.record.label) == columns
    assert drawn.texts == [text]
    assert drawn.labels == [label]
    assert drawn.record.majority is None


@pytest.mark.parametrize(
    ("task", "row", "settings", "text", "label"),
    [
        (CausalLM(), {"q": "w5", "a": "w6", "text": "w7"}, {"text": "q", "label": "a"}, ("w5",), "w6"),
        (CausalLM(), {"prompt": "w5", "completion": "w6"}, {"text": "prompt"}, ("w5",), None),
        (CausalLM(), {"prompt": "w5", "a": "w6"}, {"label": "a"}, ("w5",), "w6"),
        (CausalLM(), {"chat": CHAT, "text": "w5"}, {"text": "chat"}, (CHAT[0],), CHAT[1]),
        (Seq2SeqLM(), {"text": "w4", "article": "w5", "summary": "w6"}, {"text": "article"}, ("w5",), "w6"),
        (Seq2SeqLM(), {"en": "w5", "de": "w6"}, {"text": "en", "label": "de"}, ("w5",), "w6"),
        (MaskedLM(), {"body": "w5", "text": "w6"}, {"text": "body"}, ("w5",), None),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5"], "ner_tags": [0], "chunks": [1]}, {"label": "chunks"}, ("w5",), [1]),
        (QuestionAnswering(), {"q": "w5", "c": "w6 w7 w8", "a": SPAN}, {"text": ("q", "c"), "label": "a"}, ("w5", "w6 w7 w8"), [3, 8]),
    ],
)  # fmt: skip
def test_columns_of_a_task_by_option(
    tmp_path: Path, task: Task, row: dict[str, Any], settings: dict[str, Any], text: Any, label: Any
) -> None:
    drawn = draw_for(task, jsonl(tmp_path / "d.jsonl", row), **settings)
    assert (drawn.texts, drawn.labels) == ([text], [label])


def test_tags_match_by_name_where_both_have_names(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["I-PER", "O", "B-PER"])
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(names)}
    )
    table = {"tokens": [["w5", "w6", "w7"]], "ner_tags": [[0, 1, 2]]}
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "d")
    drawn = draw_for(TokenClassification(label2id=TAGS), tmp_path / "d")
    assert drawn.labels == [[2, 0, 1]]
    assert drawn.record.label_map == {"I-PER": 2, "O": 0, "B-PER": 1}
    mapped = {"I-PER": 0, "O": 1, "B-PER": 2}
    assert draw_for(TokenClassification(label2id=TAGS), tmp_path / "d", label_map=mapped).labels == [
        [0, 1, 2]
    ]


def test_several_labels_match_by_name(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["rage", "joy", "fear"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.Sequence(names)})
    table = {"text": ["w5"], "labels": [[0, 1, 1]]}
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "d")
    drawn = draw_for(MULTI, tmp_path / "d")
    assert drawn.labels == [[1, 0, 1]]
    assert drawn.record.label_map == {"rage": 2, "joy": 0}


@pytest.mark.parametrize(
    ("task", "row", "settings", "message"),
    [
        (SequenceClassification(label2id=GENERIC), {"text": "x", "label": [0]}, {}, 'holds lists, but the checkpoint gives one label per text; .* "problem_type"'),
        (SequenceClassification(label2id=GENERIC), {"text": "x", "label": 0}, {"text": ("a", "b", "c")}, "has no column 'a'"),
        (SequenceClassification(label2id=GENERIC), {"a": "x", "b": "x", "c": "x", "label": 0}, {"text": ("a", "b", "c")}, "sequence-classification reads 2 text columns at most, text names 3"),
        (TokenClassification(label2id=TAGS), {"tokens": "w5 w6", "tags": [0]}, {}, "column 'tokens' must hold lists of words, got 'w5 w6'"),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5", "w6"], "tags": [0]}, {}, "column 'tags' must hold a tag for each of the 2 words"),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5"], "tags": [3]}, {}, "label 3 has no counterpart"),
        (TokenClassification(label2id=TAGS), {"text": "w5", "label": 0}, {}, "no text column found in .*; its columns are text, label"),
        (TokenClassification(label2id=TAGS), {"tokens": ["w5"], "label": 0}, {}, "no label column found in"),
        (QuestionAnswering(), {"question": "w5", "context": "w6", "answers": "w6"}, {}, r"column 'answers' must hold \{text: \[...\], answer_start: \[...\]\}, got 'w6'"),
        (QuestionAnswering(), {"question": "w5", "context": "w6", "answers": {"text": ["w7"], "answer_start": [0]}}, {}, "answer_start 0 does not point at the answer 'w7'"),
        (QuestionAnswering(), {"question": "w5", "context": "w6", "answers": {"text": [""], "answer_start": [0]}}, {}, "answer_start 0 does not point at the answer ''"),
        (QuestionAnswering(), {"question": "w5", "context": "w6", "answers": SPAN}, {"text": "question"}, "reads a question and a context, text names 1"),
        (MaskedLM(), {"body": "w5"}, {}, "no text column found"),
        (MaskedLM(), {"text": "w5", "label": 0}, {"label": "label"}, "label names column 'label', but the task reads no label column"),
        (MaskedLM(), {"text": ["w5"]}, {}, "column 'text' holds list, expected text"),
        (CausalLM(), {"a": "w5", "b": "w6"}, {"text": ("a", "b")}, "causal-lm reads 1 text column at most, text names 2"),
        (CausalLM(), {"prompt": "w5", "completion": 3}, {}, "column 'completion' holds int, expected text"),
        (CausalLM(), {"messages": [{"from": "human", "value": "w5"}]}, {}, r"column 'messages' must hold chats, lists of \{role, content\}"),
        (CausalLM(), {"messages": json.dumps(CHAT)}, {}, r"column 'messages' must hold chats, lists of .*; it is their text: parse it"),
        (CausalLM(), {"messages": CHAT[:1]}, {}, "has no answer of the assistant's to anything"),
        (CausalLM(), {"messages": CHAT[1:]}, {}, "has no answer of the assistant's to anything"),
        (CausalLM(), {"input_ids": [5, 6], "position_ids": [0, 0]}, {}, r"holds token ids \(column input_ids\) and no text: samples that were packed into one sequence"),
        (CausalLM(), {"input_ids": [5, 6]}, {"text": "input_ids"}, "column 'input_ids' must hold chats"),
        (Seq2SeqLM(), {"document": "w5", "body": "w6"}, {}, "no label column found"),
        (Seq2SeqLM(), {"document": "w5", "summary": None}, {}, "column 'summary' holds NoneType, expected text"),
        (MULTI, {"text": "w5", "label": 1}, {}, "column 'label' holds int, expected lists: the labels that a text has, or a 0 or 1 for each of the 3"),
        (MULTI, {"text": "w5", "labels": [3]}, {}, "label 3 has no counterpart"),
        (MULTI, {"text": "w5", "joy": 2, "fear": 0, "rage": 0}, {}, "the labels' columns must hold 0 and 1"),
        (MULTI, {"text": "w5", "joy": 1, "fear": 0}, {}, "no label column found"),
        (Regression(label2id={"a": 0}), {"text": "w5", "label": "high"}, {}, "must hold 1 number per row, as many as the checkpoint gives, got .*high"),
        (Regression(label2id={"a": 0, "b": 1}), {"text": "w5", "label": 1.5}, {}, "must hold 2 numbers per row"),
        (Regression(label2id={"a": 0}), {"text": "w5", "label": None}, {}, "must hold 1 number per row"),
        (MultipleChoice(), {"question": "w5", "choices": "w6 w7", "label": 0}, {}, "column 'choices' must hold lists of texts"),
        (MultipleChoice(), {"question": "w5", "choices": ["w6"], "label": 0}, {}, "the same number of choices, at least 2; there are 1"),
        (MultipleChoice(), {"question": "w5", "choices": ["w6", "w7"], "label": 2}, {}, "label 2 has no counterpart"),
    ],
)  # fmt: skip
def test_data_of_another_kind_says_what_is_wrong(
    tmp_path: Path, task: Task, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        draw_for(task, jsonl(tmp_path / "d.jsonl", row), **settings)


def test_samples_with_unequal_choices_are_refused(tmp_path: Path) -> None:
    rows = [{"question": "w5", "choices": [f"w{i}" for i in range(count)], "label": 0} for count in (2, 3)]
    with pytest.raises(DataError, match="the same number of choices, at least 2; there are 2, 3"):
        draw_for(MultipleChoice(), jsonl(tmp_path / "d.jsonl", *rows))
