"""Tasks: what a checkpoint predicts, and what its loss is on a sample."""

from fisher_mask_mergekit.tasks.classes import model_class, remote_code_error, task_of
from fisher_mask_mergekit.tasks.language import CausalLM, MaskedLM, Seq2SeqLM
from fisher_mask_mergekit.tasks.likelihood import IGNORED, Batch, Categorical, Gaussian, Likelihood
from fisher_mask_mergekit.tasks.sequences import (
    MultiLabelClassification,
    MultipleChoice,
    Regression,
    SequenceClassification,
)
from fisher_mask_mergekit.tasks.task import Drawn, Encoded, Task, Tokenization
from fisher_mask_mergekit.tasks.tokens import QuestionAnswering, TokenClassification

__all__ = [
    "IGNORED",
    "Batch",
    "Categorical",
    "CausalLM",
    "Drawn",
    "Encoded",
    "Gaussian",
    "Likelihood",
    "MaskedLM",
    "MultiLabelClassification",
    "MultipleChoice",
    "QuestionAnswering",
    "Regression",
    "Seq2SeqLM",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "Tokenization",
    "model_class",
    "remote_code_error",
    "task_of",
]
