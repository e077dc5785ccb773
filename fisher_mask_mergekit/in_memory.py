"""A merge that is not written: mergekit's own plan and executor, with the tensors handed back."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor

from fisher_mask_mergekit.errors import FisherMaskError, RecipeError, first_line
from fisher_mask_mergekit.heads import Encoder


def merge_in_memory(
    document: Mapping[str, Any], name: str, *, trust_remote_code: bool = False
) -> tuple[Encoder, Any]:
    """Merge as ``mergekit-yaml`` would, but write nothing.

    Args:
        document: The recipe, as its YAML has it.
        name: What messages call the merge.
        trust_remote_code: Whether to run code that comes with a checkpoint.

    Returns:
        The merge's tensors, on the CPU, and its transformers configuration.

    Raises:
        RecipeError: If mergekit refuses the recipe, or fails.
    """
    options = MergeOptions(quiet=True, trust_remote_code=trust_remote_code)
    with _mergekit_errors(name), _loaders_of_its_own(options):
        recipe = MergeConfiguration.model_validate(document)
        architecture = get_architecture_info(recipe, options)
        config = _model_out_config(recipe, architecture, trust_remote_code=trust_remote_code)
        # Not plan_in_memory: with today's pydantic, mergekit 0.1.5 cannot make its tasks. Nothing is written, since
        # of these only the tensors themselves are asked for.
        planned = MergePlanner(recipe, architecture, options, config).plan_to_disk(out_path="")
        saved = {task.tensor_task: task for task in planned if isinstance(task, SaveTensor)}
        tensors: dict[str, Tensor] = {}
        for task, value in Executor(list(saved)).run(quiet=True):
            if value is not None:  # Else an optional one, which no input has.
                save = saved[task]
                tensors[save.tensor_name] = value.to(dtype_from_name(save.dtype)) if save.dtype else value

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((one, tensors[one]) for one in names)

    return Encoder(name, {one: tuple(value.shape) for one, value in tensors.items()}, read), config


@contextmanager
def _loaders_of_its_own(options: MergeOptions) -> Iterator[None]:
    """What mergekit opened stays open in its thread: a checkpoint that was rewritten since would be the old one."""
    cache = LoaderCache()
    before = dict(vars(cache))
    cache.loaders = {}
    cache.setup(options=options)
    try:
        yield
    finally:
        vars(cache).clear()
        vars(cache).update(before)


@contextmanager
def _mergekit_errors(name: str) -> Iterator[None]:
    """Whatever mergekit raises as one of ours: it raises its own, pydantic's and built-in errors."""
    logger = logging.getLogger("mergekit")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # Our method's own error says it best.
            if isinstance(cause, FisherMaskError):
                raise cause from error
            cause = cause.__cause__
        raise RecipeError(f"{name}: mergekit cannot merge it: {first_line(error)}") from error
    finally:
        logger.setLevel(level)
