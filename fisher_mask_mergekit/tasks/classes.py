"""Which task a checkpoint was made for, and which class loads it: told by the name of its class."""

from pathlib import Path
from typing import Any

from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from fisher_mask_mergekit.settings import FisherSettings, TaskName
from fisher_mask_mergekit.tasks.language import CausalLM, MaskedLM, Seq2SeqLM
from fisher_mask_mergekit.tasks.sequences import (
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    SequenceClassification,
)
from fisher_mask_mergekit.tasks.task import Task
from fisher_mask_mergekit.tasks.tokens import QuestionAnswering, TokenClassification

SUFFIXES: tuple[tuple[str, TaskName], ...] = (
    ("ForSequenceClassification", "sequence-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForMultipleChoice", "multiple-choice"),
    ("ForMaskedLM", "masked-lm"),
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
)
_AUTO_CLASSES: dict[TaskName, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
# These do not predict the next token, or not always, whatever their names say.
_AMBIGUOUS = ("WithLMHeadModel", "XLNetLMHeadModel", "ElectraForPreTraining", "FunnelForPreTraining")


def task_of(config: Any, checkpoint: str, settings: FisherSettings) -> Task:
    """The task of a checkpoint: the one asked for, else by its class.

    Args:
        config: The checkpoint's transformers configuration.
        checkpoint: How the user named it, for the message.
        settings: The request.

    Raises:
        CheckpointError: If the class does not tell, or is not the one of the task asked for.
        RecipeError: If the labels asked for are not to be had for the task.
    """
    architecture = _architecture(config)
    told = _name_of(architecture, config)
    if settings.task is not None and told not in (None, settings.task):
        raise CheckpointError(f"{checkpoint} is a {architecture}, made for {told}, not for {settings.task}")
    name = settings.task or told
    if name is None:
        is_one = (
            f"is a {architecture}, which"
            if config.architectures
            else "has a config.json that names no class, which"
        )
        raise CheckpointError(
            f"{checkpoint} {is_one} does not tell what it predicts; if it has a head, say which with --task, or task "
            f"in the recipe: {', '.join(_AUTO_CLASSES)}"
        )
    if architecture.endswith("Model") and told is None and architecture in _headless():
        raise CheckpointError(f"{checkpoint} is a {architecture}, which has no head, and so no loss")
    if name == "causal-lm":
        _check_causal(config, architecture, checkpoint)
    task = _build(name, config, checkpoint, settings)
    if settings.labels == "exact" and not task.predicts_once:
        raise RecipeError(
            f"labels 'exact' takes the outcomes of a sample's only prediction one by one; {checkpoint} "
            f"({task.kind}) predicts several per sample: take labels 'data' or 'sampled'"
        )
    return task


def _headless() -> set[str]:
    """Transformers' classes without a head."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    listed = (kind if isinstance(kind, tuple) else (kind,) for kind in MODEL_MAPPING_NAMES.values())
    return {name for kind in listed for name in kind}


def _build(name: TaskName, config: Any, checkpoint: str, settings: FisherSettings) -> Task:
    loss = settings.loss
    if name == "sequence-classification":
        return _sequence_task(config, checkpoint, settings)
    if name == "token-classification":
        return TokenClassification(loss, config.label2id)
    others: dict[TaskName, type[Task]] = {
        "question-answering": QuestionAnswering,
        "multiple-choice": MultipleChoice,
        "masked-lm": MaskedLM,
        "causal-lm": CausalLM,
        "seq2seq-lm": Seq2SeqLM,
    }
    return others[name](loss)


def _sequence_task(config: Any, checkpoint: str, settings: FisherSettings) -> Task:
    """Which sequence classification it is, as transformers tells it: by the problem type, else a single label."""
    problem = config.problem_type
    if problem == "multi_label_classification":
        return MultiLabelClassification(settings.loss, config.label2id)
    if problem == "regression" or (problem is None and config.num_labels == 1):
        return Regression(settings.loss, config.label2id)
    if config.num_labels < 2:
        raise CheckpointError(
            f"{checkpoint} has {config.num_labels} label(s) and problem type {problem}; "
            "classification takes at least 2 labels"
        )
    return SequenceClassification(settings.loss, config.label2id)


def _architecture(config: Any) -> str:
    names = [str(name) for name in config.architectures or [""]]
    return names[0] if len(names) == 1 else ", ".join(names)


def _name_of(architecture: str, config: Any) -> TaskName | None:
    if architecture.endswith(_AMBIGUOUS):
        return None
    if architecture.endswith("ForConditionalGeneration"):
        # Those that also see or hear are decoders that read text like any other.
        return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    if architecture.endswith("ForPreTraining") and _sibling(architecture, "ForMaskedLM"):
        return "masked-lm"
    return next((name for suffix, name in SUFFIXES if architecture.endswith(suffix)), None)


def _sibling(architecture: str, suffix: str) -> bool:
    """Whether transformers has another class for the same architecture."""
    import transformers

    family = architecture
    for ending in ("ForPreTraining", "LMHeadModel", "ForCausalLM"):
        family = family.removesuffix(ending)
    return hasattr(transformers, family + suffix)


def _check_causal(config: Any, architecture: str, checkpoint: str) -> None:
    """Refuse an encoder with a decoder's class: it sees the very tokens that it would be asked for.

    Raises:
        CheckpointError: Says so.
    """
    if _sibling(architecture, "ForMaskedLM") and not getattr(config, "is_decoder", True):
        raise CheckpointError(
            f"{checkpoint} is a {architecture} whose configuration says is_decoder: false: it sees the tokens that it "
            "is to predict; if it was trained as a decoder, set is_decoder in its config.json"
        )


def model_class(config: Any, checkpoint: str, folder: Path, task: Task, *, trust_remote_code: bool) -> Any:
    """The class to load a checkpoint with: its own.

    Args:
        config: The checkpoint's transformers configuration.
        checkpoint: How the user named it, for the message.
        folder: Where its files are.
        task: Decides where the configuration names no class.
        trust_remote_code: Whether to run code that comes with the checkpoint.

    Raises:
        CheckpointError: If there is no such class, or it is the checkpoint's own code and that is not trusted.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    architecture = _architecture(config)
    own = (getattr(config, "auto_map", None) or {}).values()
    reference = next((entry for entry in own if str(entry).endswith(f".{architecture}")), None)
    if trust_remote_code and reference:
        return get_class_from_dynamic_module(reference, str(folder))
    if not config.architectures:
        return getattr(transformers, _AUTO_CLASSES[task.name])
    found = getattr(transformers, architecture, None)
    if found is None and reference:
        raise remote_code_error(checkpoint)
    if found is None:
        raise CheckpointError(
            f"{checkpoint} is a {architecture}, a class that transformers {transformers.__version__} does not have"
        )
    if getattr(found, "main_input_name", "input_ids") != "input_ids":
        raise CheckpointError(
            f"{checkpoint} is a {architecture}, which takes {found.main_input_name}, not text"
        )
    return found


def remote_code_error(checkpoint: str) -> CheckpointError:
    """What to say where a checkpoint needs code of its own."""
    return CheckpointError(
        f"{checkpoint} comes with code of its own, which would be run here; read it, and if you trust it, add "
        "--trust-remote-code"
    )
