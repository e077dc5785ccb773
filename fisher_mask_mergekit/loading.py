"""A checkpoint as transformers loads it: configuration, tokenizer, model, and how long a sample may be."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mask_mergekit.checkpoint import Checkpoint, read_config, transformers_errors
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.skeleton import skeleton
from fisher_mask_mergekit.tasks import Task, model_class, remote_code_error

_LONGEST = 512
"""Tokens per sample at most, unless asked for more."""


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The checkpoint's transformers configuration.

    Raises:
        CheckpointError: If transformers does not know it, or only code that comes with it does.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(checkpoint)
    own_code = "AutoConfig" in (raw.get("auto_map") or {}) and raw.get("model_type") not in CONFIG_MAPPING
    if own_code and not trust_remote_code:
        raise remote_code_error(checkpoint.name)
    with transformers_errors(checkpoint):
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)


def load_tokenizer(checkpoint: Checkpoint, task: Task, *, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer, which takes single words as it takes them inside a text.

    Raises:
        CheckpointError: If there is none.
    """
    from transformers import AutoTokenizer

    def load(**options: Any) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, **options
            )
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise remote_code_error(checkpoint.name) from error
            raise

    with transformers_errors(checkpoint):
        tokenizer = load()
        if task.name == "token-classification" and getattr(tokenizer, "add_prefix_space", None) is False:
            # Else every word is read as one that goes on where another ended.
            tokenizer = load(add_prefix_space=True)
        return tokenizer


def load_model(
    checkpoint: Checkpoint,
    kind: Any,
    config: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    *,
    in_layers: bool = False,
) -> nn.Module:
    """The checkpoint's model, whole.

    Args:
        checkpoint: Where it is.
        kind: Its class.
        config: Its configuration.
        tokenizer: Its tokenizer.
        dtype: The weights'.
        state: Weights to take in place of the checkpoint's.
        in_layers: Whether its layers are put on all GPUs that there are, by accelerate.

    Raises:
        CheckpointError: If weights are missing, or the layers do not fit on the GPUs.
    """
    with transformers_errors(checkpoint):
        model, report = kind.from_pretrained(
            checkpoint.folder if state is None else None,
            config=config,
            dtype=dtype,
            state_dict=state,
            output_loading_info=True,
            device_map="auto" if in_layers else None,
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.name} has no {', '.join(sorted(report['missing_keys'])[:4])}: it is not a complete "
            f"{kind.__name__}"
        )
    check_on_gpus(checkpoint.name, model)
    _settle_config(model, tokenizer)
    return model


def check_on_gpus(name: str, model: Any) -> None:
    """Refuse layers that accelerate left elsewhere: they come to a GPU to run, and stay there for the backward pass.

    Raises:
        CheckpointError: If there are any.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if elsewhere := places & {"cpu", "disk"}:
        raise CheckpointError(
            f"{name} does not fit on the GPUs here: layers were left on {', '.join(sorted(elsewhere))}. Take several "
            "processes and --spread shards, or --spread offload, or dtype bfloat16"
        )


def bare_model(kind: Any, config: Any, tokenizer: Any, dtype: torch.dtype) -> nn.Module:
    """The same model without values, on torch's meta device, in a dtype that it was made to run in."""
    model = skeleton(kind, deepcopy(config))
    _settle_config(model, tokenizer)
    settle_dtype(model, model.dtype, dtype)
    return model


def _settle_config(model: Any, tokenizer: Any) -> None:
    text = model.config.get_text_config()
    if tokenizer.pad_token_id is not None:
        # Decoders find a sample's last token by it: it must be the one that batches are padded with.
        text.pad_token_id = tokenizer.pad_token_id
    # Nothing is generated: keys and values of earlier tokens need not be kept.
    text.use_cache = False


def settle_dtype(model: Any, loaded: torch.dtype, dtype: torch.dtype) -> None:
    """Make a model run in a dtype that it may not have been loaded in.

    Its buffers stay as they are: rotary frequencies are float32.
    """
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        # What transformers runs experts with otherwise has no float64.
        model.set_experts_implementation("eager")
    if loaded != dtype:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def longest(model: nn.Module, tokenizer: Any, settings: FisherSettings) -> int:
    """Tokens per sample: what was asked for, else 512, but no more than the checkpoint can take.

    Args:
        model: The model; its weights do not matter.
        tokenizer: Its tokenizer.
        settings: The request.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, limit if isinstance(limit, int) and limit > 0 else math.inf]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    return int(min(settings.max_length or _LONGEST, *limits))


def class_of(checkpoint: Checkpoint, config: Any, task: Task, *, trust_remote_code: bool) -> Any:
    """The class to load a checkpoint with, see :func:`~fisher_mask_mergekit.tasks.model_class`."""
    with transformers_errors(checkpoint):
        return model_class(
            config, checkpoint.name, checkpoint.folder, task, trust_remote_code=trust_remote_code
        )
