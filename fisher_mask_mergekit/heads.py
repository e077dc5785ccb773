"""From one merged encoder, a complete checkpoint per task: the encoder with that task's own head."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fisher_mask_mergekit.checkpoint import (
    Checkpoint,
    locate,
    read_config,
    read_tensors,
    side_files,
    tensor_shapes,
)
from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from fisher_mask_mergekit.recipe import Recipe, RecipeModel
from fisher_mask_mergekit.sites import Shapes
from fisher_mask_mergekit.skeleton import named_skeleton
from fisher_mask_mergekit.store import alone
from fisher_mask_mergekit.vocabulary import first_unlike, vocabulary

Pooler = Literal["own", "average"]
# What token, position and distance embeddings are called where they are not called so: GPT-2's, BART's and T5's, CTRL's.
_EMBEDDINGS = {"wte", "wpe", "shared", "w", "relative_attention_bias"}


@dataclass(frozen=True)
class Encoder:
    """A merge's tensors, in files or in memory.

    Attributes:
        name: What messages call it.
        shapes: The tensors'.
        read: The tensors of given names, with their names.
        folder: Where it was written; None if it is in memory.
    """

    name: str
    shapes: Shapes
    read: Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]
    folder: Checkpoint | None = None


def stored(checkpoint: Checkpoint) -> Encoder:
    """A merge that was written to a folder."""
    shapes = tensor_shapes(checkpoint)
    return Encoder(checkpoint.name, shapes, partial(read_tensors, checkpoint), checkpoint)


def is_head(name: str) -> bool:
    """Whether a tensor belongs to all that follows the encoder: no numbered layer, and no embedding."""
    parts = name.split(".")
    return not any(part.isdigit() or "embed" in part or part in _EMBEDDINGS for part in parts)


def is_pooler(name: str) -> bool:
    """Whether a head tensor is the pooler's, which sees the encoder's output before the classifier does."""
    return "pooler" in name.split(".")


def write_heads(recipe: Recipe, merged: str, out: Path, pooler: Pooler = "own") -> list[Path]:
    """Write one loadable checkpoint per model of a recipe.

    Each has the merged encoder, and the model's own head, configuration, label names and tokenizer.

    Args:
        recipe: What was merged.
        merged: The merged folder.
        out: Where to write a folder per model; none of them may exist.
        pooler: ``own``: the pooler is part of the head. ``average``: it is the mean of the recipe's models'
            poolers, weighted by ``weight``, as the paper's released code has it.

    Returns:
        The folders, in the recipe's order.

    Raises:
        RecipeError: If a folder exists or cannot be written, or ``pooler`` is ``average`` and a weight is not
            one plain number.
        CheckpointError: If the merged folder lacks a tensor of an encoder, or has another shape for it.
    """
    models = [model for model in recipe.models if model.is_merged]
    folders = [out / name for name in short_names([model.name for model in models])]
    for folder in folders:
        if folder.exists():
            raise RecipeError(f"{folder} exists; remove it, or choose another folder")
    encoder = stored(locate(merged))
    own = [locate(model.name) for model in models]
    encoders = [encoder_of(checkpoint, encoder) for checkpoint in own]
    average = average_pooler(models, own) if pooler == "average" else {}
    for checkpoint, its, folder in zip(own, encoders, folders, strict=True):
        _write(checkpoint, its, average, folder)
    return folders


def short_names(models: list[str]) -> list[str]:
    """The last parts of the given models' names, or the whole names where those are the same."""
    short = ["+".join(Path(part.partition("@")[0]).name for part in model.split("+")) for model in models]
    if len(set(short)) == len(short):
        return short
    return [model.strip("/").replace("/", "--") for model in models]


def encoder_of(checkpoint: Checkpoint, encoder: Encoder) -> Encoder:
    """A merge as a checkpoint's files have its encoder: experts one by one, where mergekit wrote all in one tensor.

    Args:
        checkpoint: One of what was merged.
        encoder: The merge.

    Raises:
        CheckpointError: If it lacks a tensor of the encoder, or has another shape for it, or its tokens have other
            ids than the checkpoint's, whose tokenizer it is to be run with.
    """
    own = tensor_shapes(checkpoint)
    if any(name not in encoder.shapes for name in own if not is_head(name)):
        encoder = _taken_apart(checkpoint, encoder, own)
    unlike = [
        (name, shape)
        for name, shape in own.items()
        if not is_head(name) and encoder.shapes.get(name) != shape
    ]
    if encoder.folder is not None:
        _check_vocabulary(checkpoint, encoder.folder, resized=bool(unlike))
    for name, shape in unlike:
        got = encoder.shapes.get(name, "no such tensor")
        raise CheckpointError(
            f"{encoder.name} is not a merge of {checkpoint.name}: {name}: expected {shape}, got {got}"
        )
    return encoder


def _taken_apart(checkpoint: Checkpoint, encoder: Encoder, own: Shapes) -> Encoder:
    """The merge with what a checkpoint's files do not have in the pieces that transformers saves it in."""
    model = named_skeleton(checkpoint)
    if model is None:  # Its own code says nothing of pieces.
        return encoder
    kept = [name for name in encoder.shapes if name in own or is_head(name)]
    whole = [name for name in encoder.shapes if name not in kept]
    pieces: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in whole:
        saved = revert_weight_conversion(model, {name: torch.empty(encoder.shapes[name], device="meta")})
        pieces |= {piece: (name, tuple(tensor.shape)) for piece, tensor in saved.items()}

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(names)
        yield from encoder.read(name for name in kept if name in wanted)
        for name, tensor in encoder.read({pieces[name][0] for name in wanted if name in pieces}):
            saved = revert_weight_conversion(model, {name: tensor})
            yield from ((piece, value.clone()) for piece, value in saved.items() if piece in wanted)

    shapes = {name: encoder.shapes[name] for name in kept} | {
        piece: shape for piece, (_, shape) in pieces.items()
    }
    return replace(encoder, shapes=shapes, read=read)


def _check_vocabulary(own: Checkpoint, merge: Checkpoint, *, resized: bool) -> None:
    """Refuse other tokens than a checkpoint's own: in its place another, or, where tensors differ in size, one more or less."""
    ours, theirs = (vocabulary(one) for one in (own, merge))
    if ours is None or theirs is None:
        return
    unlike = first_unlike(ours, theirs, lacking_too=resized)
    if unlike is not None:
        token, index, there = unlike
        said = f"'{token}' is token {index} of the model and " + (
            "none of the merge" if there is None else f"token {there} of the merge"
        )
    elif resized and len(theirs) != len(ours):
        said = f"the merge has {len(theirs)} tokens, the model {len(ours)}"
    else:
        return
    raise CheckpointError(
        f"{merge.name} has another vocabulary than {own.name}: {said}. The model's own tokenizer does not fit the merge's "
        "embeddings: merge models of one vocabulary, with neither tokenizer nor tokenizer_source in the recipe"
    )


def average_pooler(models: Iterable[RecipeModel], own: Iterable[Checkpoint]) -> dict[str, Tensor]:
    """The mean of the checkpoints' poolers, weighted by the models' ``weight``.

    Raises:
        RecipeError: If a weight is not one plain number, or they add up to 0.
        CheckpointError: If a checkpoint has no pooler.
    """
    total: dict[str, Tensor] = {}
    weights = 0.0
    for model, checkpoint in zip(models, own, strict=True):
        if model.weight == "varies":
            raise RecipeError(
                f"the weight of {model.name} is not one plain number: there is no average to weight by it"
            )
        weight = float(model.counts) if model.weight is None else model.weight
        if weight == 0:
            continue
        weights += weight
        names = [name for name in tensor_shapes(checkpoint) if is_pooler(name)]
        if not names:
            raise CheckpointError(f"{checkpoint.name} has no pooler to average")
        for name, tensor in read_tensors(checkpoint, names):
            total[name] = total.get(name, 0) + weight * tensor.double()
    if weights <= 0:
        raise RecipeError("the models' weights add up to 0; there is no average of their poolers")
    return {name: tensor / weights for name, tensor in total.items()}


def _write(checkpoint: Checkpoint, encoder: Encoder, pooler: Mapping[str, Tensor], folder: Path) -> None:
    state = headed_state(checkpoint, encoder, pooler)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    config = read_config(checkpoint) | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    try:
        with alone(folder):
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            try:
                save_torch_state_dict(state, temporary)
                (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                for file in side_files(checkpoint):
                    if file.name != "config.json":
                        shutil.copy(file, temporary / file.name)
                temporary.chmod(0o755)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror or error}") from error


def headed_state(checkpoint: Checkpoint, encoder: Encoder, pooler: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged encoder's tensors with a checkpoint's own head, in the encoder's dtype.

    Args:
        checkpoint: Whose head.
        encoder: The merge, as :func:`encoder_of` gives it.
        pooler: Tensors that take the place of the checkpoint's own pooler.
    """
    own_shapes = tensor_shapes(checkpoint)
    state = dict(encoder.read(name for name in encoder.shapes if name in own_shapes and not is_head(name)))
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    head = dict(read_tensors(checkpoint, (name for name in own_shapes if is_head(name))))
    for name, tensor in {**head, **pooler}.items():
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


def describe_head(names: Iterable[str], limit: int = 6) -> str:
    """Module names of the given tensors, for comments and messages."""
    modules: dict[str, Any] = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    listed = list(modules)[:limit]
    return ", ".join(listed) + (f" and {len(modules) - limit} more" if len(modules) > limit else "")
