"""Which task a checkpoint was made for, and which class loads it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.tasks import CausalLM, SequenceClassification, model_class, task_of


def config(architecture: str | None, **changes: Any) -> Any:
    base = {
        "architectures": architecture and [architecture],
        "num_labels": 2,
        "problem_type": None,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "is_encoder_decoder": False,
    }
    return SimpleNamespace(**base | changes)


def kind(configuration: Any, **settings: Any) -> str:
    return task_of(configuration, "./model", FisherSettings(**settings)).kind


@pytest.mark.parametrize(
    ("architecture", "changes", "wanted"),
    [
        ("BertForSequenceClassification", {}, "sequence-classification"),
        ("LlamaForSequenceClassification", {"problem_type": "single_label_classification"}, "sequence-classification"),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "multi-label-classification"),
        ("BertForSequenceClassification", {"problem_type": "regression"}, "regression"),
        ("BertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("RobertaForTokenClassification", {}, "token-classification"),
        ("DistilBertForQuestionAnswering", {}, "question-answering"),
        ("BertForMultipleChoice", {}, "multiple-choice"),
        ("ModernBertForMaskedLM", {}, "masked-lm"),
        ("BertForPreTraining", {}, "masked-lm"),
        ("Qwen2ForCausalLM", {}, "causal-lm"),
        ("GPT2LMHeadModel", {}, "causal-lm"),
        ("BertLMHeadModel", {"is_decoder": True}, "causal-lm"),
        ("LlavaForConditionalGeneration", {}, "causal-lm"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "seq2seq-lm"),
        ("NobodysOwnForCausalLM", {}, "causal-lm"),
    ],
)  # fmt: skip
def test_the_class_tells_the_task(architecture: str, changes: dict[str, Any], wanted: str) -> None:
    assert kind(config(architecture, **changes)) == wanted


@pytest.mark.parametrize(
    "architecture",
    ["ElectraForPreTraining", "FunnelForPreTraining", "XLMWithLMHeadModel", "XLNetLMHeadModel", "NobodysOwn", None],
)  # fmt: skip
def test_a_class_that_does_not_tell_is_an_error_unless_the_task_is_said(architecture: str | None) -> None:
    with pytest.raises(
        CheckpointError, match=r"\./model (is a|has) .*, which does not tell what it predicts; .* --task"
    ):
        kind(config(architecture))
    assert kind(config(architecture), task="masked-lm") == "masked-lm"


def test_classification_takes_two_labels() -> None:
    single = config("BertForSequenceClassification", num_labels=1, problem_type="single_label_classification")
    with pytest.raises(
        CheckpointError, match=r"has 1 label\(s\) and problem type single_label_classification"
    ):
        kind(single)


def test_a_task_that_is_not_the_classs_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="a BertForMaskedLM, made for masked-lm, not for causal-lm"):
        kind(config("BertForMaskedLM"), task="causal-lm")
    assert kind(config("BertForMaskedLM"), task="masked-lm") == "masked-lm"


@pytest.mark.parametrize("architecture", ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"])
def test_an_encoder_with_a_decoders_class_is_refused(architecture: str) -> None:
    with pytest.raises(CheckpointError, match="is_decoder: false: it sees the tokens that it is to predict"):
        kind(config(architecture, is_decoder=False))


def test_the_loss_is_the_tasks() -> None:
    for loss in ("mean", "sum"):
        for architecture in (
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForMaskedLM",
        ):
            settings = FisherSettings.model_validate({"loss": loss})
            assert task_of(config(architecture), "m", settings).loss == loss


@pytest.mark.parametrize(
    ("architecture", "changes", "fits"),
    [
        ("BertForSequenceClassification", {}, True),
        ("BertForMultipleChoice", {}, True),
        ("BertForSequenceClassification", {"problem_type": "regression", "label2id": {"a": 0}, "num_labels": 1}, True),
        ("BertForSequenceClassification", {"problem_type": "regression"}, False),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, False),
        ("BertForTokenClassification", {}, False),
        ("BertForQuestionAnswering", {}, False),
        ("BertForMaskedLM", {}, False),
        ("Qwen2ForCausalLM", {}, False),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, False),
    ],
)  # fmt: skip
def test_exact_labels_take_one_prediction_per_sample(
    architecture: str, changes: dict[str, Any], fits: bool
) -> None:
    if fits:
        kind(config(architecture, **changes), labels="exact")
        return
    with pytest.raises(RecipeError, match="predicts several per sample: take labels 'data' or 'sampled'"):
        kind(config(architecture, **changes), labels="exact")


def load(configuration: Any, task: Any = None, folder: Path = Path(), trust: bool = False) -> Any:
    task = task or SequenceClassification()
    return model_class(configuration, "./model", folder, task, trust_remote_code=trust)


def test_a_checkpoint_is_loaded_as_its_own_class() -> None:
    assert load(config("BertForSequenceClassification")) is transformers.BertForSequenceClassification
    assert load(config("GPT2LMHeadModel")) is transformers.GPT2LMHeadModel
    assert load(config(None), CausalLM()) is transformers.AutoModelForCausalLM


def test_classes_that_cannot_be_loaded_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a NobodysOwn, a class that transformers \d+.* does not have"
    ):
        load(config("NobodysOwn"))
    with pytest.raises(
        CheckpointError, match="a Wav2Vec2ForSequenceClassification, which takes input_values, not text"
    ):
        load(config("Wav2Vec2ForSequenceClassification"))
    own = config("MyForCausalLM", auto_map={"AutoModelForCausalLM": "modeling_my.MyForCausalLM"})
    with pytest.raises(
        CheckpointError, match=r"comes with code of its own, which would be run here; .* --trust-remote-code"
    ):
        load(own, CausalLM())
    (tmp_path / "modeling_my.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass MyForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    found = load(own, CausalLM(), tmp_path, trust=True)
    assert found.__name__ == "MyForCausalLM"
    assert issubclass(found, transformers.LlamaForCausalLM)
