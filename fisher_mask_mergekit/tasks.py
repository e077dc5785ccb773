"""What a checkpoint's loss is: the log-probabilities of the labels, per sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import CheckpointError

_SUFFIX = "ForSequenceClassification"


def check_task(config: Any, checkpoint: str) -> None:
    """Refuse a checkpoint whose loss is not that of single-label sequence classification.

    Args:
        config: The checkpoint's transformers configuration.
        checkpoint: How the user named it, for the message.

    Raises:
        CheckpointError: Names the checkpoint's class, or its problem type.
    """
    names = config.architectures or ["no class at all"]
    if len(names) != 1 or not names[0].endswith(_SUFFIX):
        raise CheckpointError(
            f"{checkpoint} is a {', '.join(names)}; the pre-pass measures sequence classifiers "
            f"(a class that ends in {_SUFFIX})."
        )
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise CheckpointError(
            f"{checkpoint} has {config.num_labels} label(s) and problem type {config.problem_type}; "
            "the pre-pass measures single-label classification with at least 2 labels."
        )


def log_probabilities(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of every label, in nats.

    Args:
        model: A sequence classifier.
        inputs: What the model takes, batch first.

    Returns:
        ``[B, C]``, float32 or wider.
    """
    logits = model(**inputs).logits
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
