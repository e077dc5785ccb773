"""Every task from a checkpoint and a data set to the sidecar, against explicit masks one sample at a time."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoTokenizer

from fisher_mask_mergekit import store
from fisher_mask_mergekit.data import load_samples
from fisher_mask_mergekit.encoding import encode_samples
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import Sidecar, read
from fisher_mask_mergekit.sites import Site
from fisher_mask_mergekit.tasks import Tokenization, task_of
from tests import tiny, tiny_tasks
from tests.test_cli import run
from tests.test_encoding import TEMPLATE

DRAW = tiny_tasks.Draw(3)


def words(low: int, high: int) -> list[str]:
    return [f"w{index}" for index in DRAW.ids(DRAW.number(low, high))]


def text(low: int = 2, high: int = 9) -> str:
    return " ".join(words(low, high))


def tagged() -> dict[str, Any]:
    tokens = words(2, 9)
    return {"tokens": tokens, "ner_tags": [DRAW.number(0, 3) for _ in tokens]}


def answered() -> dict[str, Any]:
    context = words(3, 9)
    place = DRAW.number(0, len(context))
    answers = {"text": [context[place]], "answer_start": [len(" ".join([*context[:place], ""]))]}
    empty: dict[str, list[Any]] = {"text": [], "answer_start": []}
    return {"question": text(2, 4), "context": " ".join(context), "answers": answers if place else empty}


def chat() -> dict[str, Any]:
    roles = ["user", "assistant"] * DRAW.number(1, 3)
    return {"messages": [{"role": role, "content": text(1, 5)} for role in roles]}


ROWS: dict[str, Any] = {
    "token-classification": tagged,
    "question-answering": answered,
    "multiple-choice": lambda: {"question": text(), "choices": [text(), text(), text()], "label": DRAW.number(0, 3)},
    "masked-lm": lambda: {"text": text()},
    "text": lambda: {"text": text()},
    "completion": lambda: {"prompt": text(), "completion": text()},
    "chat": chat,
    "seq2seq-lm": lambda: {"source": text(), "target": text()},
    "multi-label-classification": lambda: {"text": text(), "labels": [DRAW.number(0, 2) for _ in range(3)]},
    "regression": lambda: {"text": text(), "label": DRAW.number(-20, 20) / 7},
}  # fmt: skip
CASES = [
    ("bert-tokens", "token-classification"),
    ("llama-tokens", "token-classification"),
    ("distilbert-answers", "question-answering"),
    ("bert-choices", "multiple-choice"),
    ("roberta-masked", "masked-lm"),
    ("bert-pretraining", "masked-lm"),
    ("llama-causal", "text"),
    ("gpt2-causal", "completion"),
    ("llama-causal", "chat"),
    ("t5-seq2seq", "seq2seq-lm"),
    ("bart-seq2seq", "seq2seq-lm"),
    ("roberta-sequences", "multi-label-classification"),
    ("roberta-sequences", "regression"),
]


def checkpoint(folder: Path, name: str, rows: str, **changes: Any) -> tuple[Path, Path]:
    """A checkpoint with a head, and data for it."""
    if rows == "regression":
        changes |= {"labels": 1}
    elif rows == "multi-label-classification":
        changes |= {"problem_type": "multi_label_classification"}
    tiny_tasks.model(name, **changes).float().save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(ROWS[rows]()) + "\n" for _ in range(8)))
    return folder / "model", data


def measured(model: Path, data: Path, *options: str) -> Sidecar:
    run("compute", model, "--data", data, "--dtype", "float64", "--batch-size", "3", *options)
    return read(model / store.BESIDE)


def explicit(kind: Any, folder: Path, found: Sidecar, losses: Any) -> dict[tuple[str, str], Tensor]:
    """Masks that multiply the sites' inputs, squared gradients by autograd, one loss at a time."""
    model = kind.from_pretrained(folder, dtype=torch.float64).eval()
    masks: dict[tuple[str, str], Tensor] = {}

    def multiply(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = torch.ones(args[0].shape[-1], dtype=torch.float64)
        for node, (count,) in site.nodes().items():
            one = masks.setdefault(
                (site.output, node), torch.ones(count, dtype=torch.float64, requires_grad=True)
            )
            mask = mask * one.repeat_interleave(args[0].shape[-1] // count)
        return (args[0] * mask, *args[1:])

    for site in found.metadata.sites:
        model.get_submodule(site.output).register_forward_pre_hook(partial(multiply, site))
    sums: dict[tuple[str, str], Any] = {}
    count = 0
    for loss in losses(model):
        gradients = torch.autograd.grad(loss, list(masks.values()))
        for key, gradient in zip(masks, gradients, strict=True):
            sums[key] = sums.get(key, 0) + gradient.square()
        count += 1
    return {key: total / count for key, total in sums.items()}


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_compute_equals_explicit_masks(tmp_path: Path, name: str, rows: str) -> None:
    folder, data = checkpoint(tmp_path, name, rows)
    kind = tiny_tasks.MODELS[name][0]
    found = measured(folder, data)
    metadata = found.metadata
    assert metadata.architecture == kind.__name__
    assert metadata.task == (rows if "-" in rows or rows == "regression" else "causal-lm")
    assert (metadata.samples, metadata.truncated) == (8, 0)
    assert (metadata.accuracy is None) == (rows == "regression")
    settings = FisherSettings(data=str(data))
    loaded = kind.from_pretrained(folder)
    task = task_of(loaded.config, "m", settings)
    encoded = encode_samples(
        load_samples(settings, task), task, Tokenization(AutoTokenizer.from_pretrained(folder), 40)
    )

    def losses(model: Any) -> Any:
        for one in encoded.samples.values():
            own = tiny_tasks.own_loss(model, one)
            yield own / 2 if rows == "regression" else own

    wanted = explicit(kind, folder, found, losses)
    assert len(wanted) == sum(len(site.nodes()) for site in metadata.sites)
    assert {site.kind for site in metadata.sites} == {"attention", "ffn"}
    for (output, node), value in wanted.items():
        got = found.fisher[output][node]  # type: ignore[index]
        assert_close(got.double(), value, rtol=1e-5, atol=1e-6 * float(value.max()))


def test_the_sum_is_another_measurement_and_recorded(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path, "llama-causal", "completion")
    mean = measured(folder, data)
    total = measured(folder, data, "--loss", "sum")
    assert (mean.metadata.settings.loss, total.metadata.settings.loss) == ("mean", "sum")
    assert total.metadata.loss > 1.5 * mean.metadata.loss
    assert total.metadata.accuracy == mean.metadata.accuracy


def test_what_was_truncated_and_left_out_is_said_every_time(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path, "llama-causal", "text")
    rows = [{"text": text} for text in ("", "w5 w6 w7 w8", "w5 w6", "w7 w8 w9 w10 w11")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    for _ in range(2):
        said = run("compute", folder, "--data", data, "--max-length", "3").stderr
        assert "has 4 rows, 128 were asked for: used all" in said
        assert "1 of 4 samples held nothing to predict within 3 tokens and were left out" in said
        assert "2 of 3 samples were longer than 3 tokens and were truncated" in said
    metadata = read(folder / store.BESIDE).metadata
    assert (metadata.samples, metadata.truncated, metadata.max_length) == (3, 2, 3)


def test_a_change_of_the_problem_type_is_another_task(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path, "roberta-sequences", "regression", problem_type="regression")
    again = ("compute", folder, "--data", data)
    run(*again)
    assert "measured before" in run(*again).stdout
    assert "accuracy" not in run(*again).stdout
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    assert "expected lists" in run(*again, code=1).stderr


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("llama-causal", "text", ("--labels", "exact"), r"model \(causal-lm\) predicts several per sample"),
        ("llama-causal", "text", ("--task", "masked-lm"), "made for causal-lm, not for masked-lm"),
        ("bert-tokens", "text", (), "no text column found"),
        ("roberta-masked", "text", ("--max-length", "2"), "none of the 8 samples holds anything to predict for masked-lm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_error_before_anything_is_measured(
    tmp_path: Path, name: str, rows: str, options: tuple[str, ...], message: str
) -> None:
    import re

    folder, data = checkpoint(tmp_path, name, rows)
    result = run("compute", folder, "--data", data, *options, code=1)
    assert re.search(message, result.stderr), result.stderr
    assert not (folder / store.BESIDE).exists()


def test_code_that_comes_with_a_checkpoint_runs_only_if_told(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path, "llama-causal", "text")
    (folder / "modeling_my.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass MyForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["MyForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_my.MyForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused = run("compute", folder, "--data", data, code=1).stderr
    assert "comes with code of its own" in refused
    assert "--trust-remote-code" in refused
    run("compute", folder, "--data", data, "--trust-remote-code")
    assert read(folder / store.BESIDE).metadata.architecture == "MyForCausalLM"
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher_mask\nmodels: [{{model: {folder}, fisher: {{data: {data}, trust_remote_code: 1}}}}]"
    )
    assert "unknown key 'trust_remote_code'" in run("compute", recipe, code=1).stderr


def test_so_does_a_tokenizers(tmp_path: Path) -> None:
    folder, data = checkpoint(tmp_path, "llama-causal", "text")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "MyTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert "comes with code of its own" in run("compute", folder, "--data", data, code=1).stderr


def test_roberta_reads_single_words_as_it_reads_them_in_a_text(tmp_path: Path) -> None:
    from transformers import RobertaTokenizer

    from fisher_mask_mergekit.checkpoint import locate
    from fisher_mask_mergekit.loading import load_tokenizer
    from fisher_mask_mergekit.tasks import SequenceClassification, TokenClassification

    vocabulary = {
        "<s>": 0,
        "<pad>": 1,
        "</s>": 2,
        "<unk>": 3,
        "<mask>": 4,
        "Ġ": 5,
        "a": 6,
        "b": 7,
        "Ġa": 8,
        "Ġb": 9,
    }
    RobertaTokenizer(vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b")]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    for task, wanted in ((TokenClassification(), [0, 8, 9, 2]), (SequenceClassification(), [0, 6, 7, 2])):
        tokenizer = load_tokenizer(locate(str(tmp_path)), task, trust_remote_code=False)
        assert tokenizer(["a", "b"], is_split_into_words=True)["input_ids"] == wanted
