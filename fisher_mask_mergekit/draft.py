"""A first recipe for given checkpoints: one that mergekit will run."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fisher_mask_mergekit import store
from fisher_mask_mergekit.checkpoint import (
    Checkpoint,
    locate,
    read_config,
    tensor_shapes,
    transformers_errors,
)
from fisher_mask_mergekit.errors import CheckpointError, RecipeError
from fisher_mask_mergekit.heads import describe_head, is_head
from fisher_mask_mergekit.recipe import METHOD
from fisher_mask_mergekit.settings import RANDOM
from fisher_mask_mergekit.sites import Shapes, layer_of


def draft_recipe(names: Sequence[str], data: Sequence[str] = (), parent: str | None = None) -> str:
    """Write a recipe that merges the given checkpoints.

    Where all tensors agree in shape, a plain ``models:`` list. Where heads differ, mergekit refuses to
    merge them before any method runs; then full-range ``slices:`` and one empty slice that takes the head of
    the first checkpoint: last, where mergekit knows the architecture and counts the head among what
    follows the layers; first, where it infers the architecture and counts it among what precedes them. With a
    parent always slices, since a slice can have a base model of its own: the first checkpoint stays that of the merge.

    Args:
        names: Local folders or hub ids, the one whose head and configuration the merge gets first.
        data: What to measure each on, in the same order; may be shorter.
        parent: What all of them were fine-tuned from, to add their changes up.

    Returns:
        YAML.

    Raises:
        CheckpointError: If the checkpoints differ in more than their heads, or the parent is of another class or size.
        RecipeError: If a checkpoint is named twice, or there are more data sets than checkpoints.
    """
    if len(data) > len(names):
        raise RecipeError(f"got {len(data)} data sets for {len(names)} checkpoints")
    checkpoints = [locate(name) for name in names]
    # mergekit looks a relative path up on the hub when it writes the model card, and fails offline.
    names = [store.absolute(name) for name in names]
    parent = None if parent is None else store.absolute(parent)
    if len({*names, parent}) != len(names) + 1:
        raise RecipeError("a checkpoint is named twice")
    shapes = [tensor_shapes(checkpoint) for checkpoint in checkpoints]
    unequal = _unequal(shapes)
    entries = [
        (name, _measurement(checkpoint, data[index] if index < len(data) else None))
        for index, (name, checkpoint) in enumerate(zip(names, checkpoints, strict=True))
    ]
    if parent is None:
        return _slices_recipe(entries, checkpoints, shapes, unequal) if unequal else _models_recipe(entries)
    unlike = _unlike_parent(parent, checkpoints[0], shapes[0])
    if not _class_of(checkpoints[0]).endswith(_LANGUAGE):  # A parent's head for a task is none.
        unlike += [name for name in shapes[0] if is_head(name)]
    unequal += [name for name in dict.fromkeys(unlike) if name not in unequal]
    return _slices_recipe(entries, checkpoints, shapes, unequal, parent)


def _unequal(shapes: Sequence[Shapes]) -> list[str]:
    names = dict.fromkeys(name for one in shapes for name in one)
    return [name for name in names if len({one.get(name) for one in shapes}) > 1]


def _unlike_parent(parent: str, first: Checkpoint, shapes: Shapes) -> list[str]:
    """The head's tensors that a parent has in another shape."""
    found = locate(parent)
    kind, own = (_class_of(one) for one in (first, found))
    if kind != own:  # mergekit then takes the architecture of any of them.
        out = f"{Path(parent).resolve().name}-as-{kind}"
        places = [json.dumps(one, ensure_ascii=False) for one in (parent, out)]
        code = f"from transformers import {kind} as M; M.from_pretrained({places[0]}).save_pretrained({places[1]})"
        raise CheckpointError(
            f"{parent} is a {own}, the checkpoints are {kind}, and mergekit merges models of one class. Save it once as theirs, "
            f"with a head that is not used, and give that:\n  python -c {shlex.quote(code)}"
        )
    there = tensor_shapes(found)
    unlike = [name for name in shapes if there.get(name) != shapes[name]]
    if beyond := [name for name in unlike if not is_head(name)]:
        name = beyond[0]
        raise CheckpointError(
            f"{parent} is no parent of these checkpoints: {name} is {list(shapes[name])}, there "
            f"{list(there[name]) if name in there else 'it is not'}"
        )
    return unlike


def _class_of(checkpoint: Checkpoint) -> str:
    named = read_config(checkpoint).get("architectures")
    if not named or not named[0].isidentifier():  # It goes into a command.
        raise CheckpointError(
            f"{checkpoint.name}: config.json does not name a class: architectures is {named!r:.80}"
        )
    return str(named[0])


def _measurement(checkpoint: Checkpoint, data: str | None) -> str:
    if data is None and store.find(checkpoint) is not None:
        return ""
    if data is None:
        return "fisher: {data: DATASET}  # fill in: what this checkpoint was fine-tuned on"
    if data == RANDOM:  # Random tokens have no labels of their own.
        return f"fisher: {{data: {RANDOM}, labels: sampled}}"
    local = str(Path(data).resolve()) if Path(data).exists() else data
    return f"fisher: {{data: {json.dumps(local)}}}"


def _models_recipe(entries: Sequence[tuple[str, str]]) -> str:
    lines = [f"merge_method: {METHOD}", "models:"]
    for name, measurement in entries:
        lines += [f"  - model: {json.dumps(name)}"]
        lines += [f"    {measurement}"] if measurement else []
        lines += ["    parameters: {weight: 1.0}"]
    # Without a base model, mergekit takes the configuration from an arbitrary input.
    lines += [f"base_model: {json.dumps(entries[0][0])}  # whose configuration and tokenizer the merge gets"]
    return "\n".join([*lines, *_DEFAULTS, ""])


def _slices_recipe(
    entries: Sequence[tuple[str, str]],
    checkpoints: Sequence[Checkpoint],
    shapes: Sequence[Shapes],
    unequal: Sequence[str],
    parent: str | None = None,
) -> str:
    layers, follows, inferred = _layout(checkpoints[0], shapes[0])
    beyond = [name for name in unequal if not is_head(name) or (name in shapes[0] and name not in follows)]
    if beyond:
        listed = "; ".join(f"{name} {[one.get(name, 'none') for one in shapes]}" for name in beyond[:3])
        raise CheckpointError(f"the checkpoints differ in more than their heads: {listed}")
    first = json.dumps(entries[0][0])
    full = ["  - sources:"]
    for name, measurement in entries:
        full += [f"      - model: {json.dumps(name)}", f"        layer_range: [0, {layers}]"]
        full += [f"        {measurement}"] if measurement else []
        full += ["        parameters: {weight: 1.0}"]
    if parent is not None:
        name = json.dumps(parent)
        full[:1] = [f"  - base_model: {name}  # what all of them were fine-tuned from", "    sources:"]
        full += [f"      - {{model: {name}, layer_range: [0, {layers}]}}"]
    edge = 0 if inferred else layers
    said, empty = [], []
    if unequal:
        said = [
            f"# The heads differ ({describe_head(unequal)}), and mergekit merges tensors of one shape only.",
            "# The merge has the head of the first model. For a checkpoint per task, each with its own head:",
            "#   mergekit-fisher heads RECIPE MERGED OUT",
        ]
        empty = [
            f"  # No layers: takes from one model {describe_head(sorted(follows))}.",
            "  - sources:",
            f"      - {{model: {first}, layer_range: [{edge}, {edge}], parameters: {{weight: 1.0}}}}",
        ]
    lines = [
        *said,
        f"merge_method: {METHOD}",
        f"base_model: {first}  # whose configuration and tokenizer the merge gets",
        "slices:",
        *(empty + full if inferred else full + empty),
        *([_FROM_PARENT.format(1 if len(entries) < _MANY else 3)] if parent is not None else []),
        *_DEFAULTS,
    ]
    return "\n".join([*lines, ""])


_FROM_PARENT = (
    "parameters: {{nodes: columns, normalize: tensor, prior: {}, clip: true}}  # docs/choosing.md says why"
)
_MANY = 5
_LANGUAGE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_DEFAULTS = ["fisher: {samples: 128, seed: 0}", "dtype: float32"]


def _layout(checkpoint: Checkpoint, shapes: Shapes) -> tuple[int, set[str], bool]:
    """Number of layers, the tensors that an empty slice takes along, and whether mergekit infers them."""
    from mergekit.architecture import arch_info_for_config
    from transformers import AutoConfig

    with transformers_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    architecture = arch_info_for_config(config)
    loose = {name for name in shapes if not layer_of(name)}
    if architecture is None:
        return 1 + max(int(layer) for name in shapes if (layer := layer_of(name))), loose, True
    if len(architecture.modules) != 1:
        raise CheckpointError(
            f"{checkpoint.name}: mergekit has several modules for it, and slices: takes one"
        )
    module = next(iter(architecture.modules.values())).architecture
    return module.num_layers(config), loose & {weight.name for weight in module.post_weights(config)}, False
