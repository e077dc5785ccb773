"""What mergekit will do with a recipe: its own plan, made from names and shapes alone.

mergekit plans a merge as tasks before it loads a tensor. Here it plans on stand-ins for the checkpoints:
folders with the configuration and an index of tensor names, no weights. Then every input is loaded with
mergekit's own task, as a tensor without values.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, first_line
from fisher_mask_mergekit.preview.peek import Peeked
from fisher_mask_mergekit.recipe import Recipe
from fisher_mask_mergekit.sites import Shapes, layer_of

_MODEL_KEYS = ("model", "base_model", "tokenizer_source", "source")


@dataclass(frozen=True)
class Input:
    """One model's part in an output tensor.

    Attributes:
        model: As the recipe names it.
        name: What the tensor is called for this model, which is another layer's where layers are moved.
        shape: None if the model has no such tensor.
        is_base: Whether it is the base model.
        parameters: The method's parameters for this input, with filters and gradients resolved.
        problem: Why mergekit will not load it.
    """

    model: str
    name: str
    shape: tuple[int, ...] | None
    is_base: bool
    parameters: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Output:
    """A tensor that mergekit will write if any of its inputs is there.

    Attributes:
        name: Its name.
        inputs: What it is made of.
        parameters: The method's parameters for the merge as a whole.
        vocabulary_axis: The axis that token ids count along, if there is one.
        aligned: Whether a tokenizer brings the inputs to one vocabulary.
    """

    name: str
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Any]
    vocabulary_axis: int | None
    aligned: bool

    @property
    def there(self) -> tuple[Input, ...]:
        """The inputs that exist."""
        return tuple(one for one in self.inputs if one.shape is not None)


def plan_merge(recipe: Recipe, models: Mapping[str, Peeked]) -> tuple[Output, ...]:
    """Let mergekit plan a recipe.

    Args:
        recipe: The recipe.
        models: Its models by name, each with known shapes.

    Raises:
        RecipeError: If mergekit refuses the recipe before it loads a tensor; says what mergekit says.
    """
    with tempfile.TemporaryDirectory() as work, _silence():
        folders = {
            name: _stand_in(Path(work) / str(index), peeked)
            for index, (name, peeked) in enumerate(models.items())
        }
        try:
            return _plan(_renamed(recipe.document, folders), folders, models)
        except FisherMaskError as error:  # The methods' own.
            raise RecipeError(f"{recipe.path}: {error}") from error
        except (
            Exception
        ) as error:  # mergekit raises RuntimeError, ValueError, TypeError, pydantic's and others.
            message = " ".join(str(error).split())
            message = message if len(message) < 300 else f"{message[:120]} ... {message[-120:]}"
            for name, folder in folders.items():
                message = message.replace(folder, name)
            raise RecipeError(f"mergekit refuses {recipe.path}: {type(error).__name__}: {message}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """What mergekit logs while it plans, a merge will log again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _stand_in(folder: Path, peeked: Peeked) -> str:
    folder.mkdir()
    shutil.copy(peeked.checkpoint.folder / "config.json", folder)
    index = {"weight_map": dict.fromkeys(peeked.shapes or (), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def _renamed(value: Any, folders: Mapping[str, str], key: str = "") -> Any:
    """The recipe with every model's name replaced by its stand-in."""
    if isinstance(value, dict):
        return {inner: _renamed(one, folders, inner) for inner, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, folders) for one in value]
    return folders.get(value, value) if key in _MODEL_KEYS and isinstance(value, str) else value


def _plan(
    document: dict[str, Any], folders: Mapping[str, str], models: Mapping[str, Peeked]
) -> tuple[Output, ...]:
    from mergekit.architecture import get_architecture_info
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.merge import _model_out_config  # Whoever calls the planner has to make this.
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(document)
    loaders = {
        ModelReference.parse(folder): _Loader(name, models[name].shapes or {})
        for name, folder in folders.items()
    }
    cache = LoaderCache().loaders
    cache.update(loaders)
    try:
        options = MergeOptions()
        architecture = get_architecture_info(config, options)
        out_config = _model_out_config(config, architecture)
        tasks = MergePlanner(config, architecture, options, out_config).plan_to_disk("")
        return tuple(_output(task, loaders) for task in tasks if isinstance(task, SaveTensor))
    finally:
        for reference in loaders:
            cache.pop(reference, None)


def _output(task: Any, loaders: Mapping[Any, "_Loader"]) -> Output:
    from mergekit.io.tasks import GatherTensors

    merge = task.tensor_task
    gather = merge.gather_tensors
    aligned = not isinstance(gather, GatherTensors)
    if aligned:
        gather = gather.gather_tensors
    loads = gather.arguments()
    inputs = []
    for reference in merge.model_order:
        name = gather.weight_info[reference].name
        shape, problem = loaders[reference].load(loads[f"{reference}:{name}"])
        parameters = dict(merge.input_parameters[reference].items())
        is_base = reference == merge.base_model
        inputs.append(Input(loaders[reference].model, name, shape, is_base, parameters, problem))
    axis = merge.output_weight.vocabulary_axis
    return Output(task.tensor_name, tuple(inputs), dict(merge.parameters.items()), axis, aligned)


class _Loader:
    """As much of mergekit's loader as its tasks ask for; the tensors have no values."""

    def __init__(self, model: str, shapes: Shapes) -> None:
        self.model = model
        self.index = self
        self._shapes = shapes
        self._layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            self._layers.setdefault(layer_of(name), {})[name] = shape
        self.tensor_paths: Shapes = shapes

    def get_tensor(self, name: str, **_options: Any) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")

    def load(self, task: Any) -> tuple[tuple[int, ...] | None, str]:
        """Shape of what mergekit will load, and why it will not."""
        problem = ""
        # mergekit tries every tensor of a checkpoint for one that has to be put together: first a layer's.
        for paths in (self._layers.get(layer_of(task.tensor), {}), self._shapes):
            self.tensor_paths = paths
            try:
                tensor = task.model_copy(update={"device": "meta"}).execute()
            except RuntimeError as error:
                problem = first_line(error).replace(str(task.model), self.model)
                continue
            if tensor is not None:
                self.tensor_paths = self._shapes
                return tuple(tensor.shape), ""
        return None, problem
