"""References of the form ``base+adapter``: the checkpoint that mergekit makes of them."""

import atexit
import shutil
import tempfile
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from fisher_mask_mergekit.checkpoint import TOKENIZER_FILES, Checkpoint, locate
from fisher_mask_mergekit.errors import CheckpointError, first_line
from fisher_mask_mergekit.store import alone, cache_folder


@lru_cache
def _workplace() -> Path:
    """Merged checkpoints are as large as their bases: they go when the program ends, or when the next one begins.

    No sidecar's place in the cache begins with a dot.
    """
    for left in cache_folder().glob(".adapted-*"):
        with suppress(OSError), alone(left):  # Nobody's any more.
            shutil.rmtree(left)
    folder = cache_folder() / f".adapted-{uuid4().hex}"
    stack = ExitStack()
    atexit.register(stack.close)
    stack.enter_context(alone(folder))
    folder.mkdir()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def apply_adapter(name: str) -> Checkpoint:
    """Apply an adapter to its base as mergekit does, so that the values are the ones that mergekit will merge.

    Args:
        name: ``base+adapter``, each a local folder or a hub id with or without ``@revision``.

    Raises:
        CheckpointError: If either cannot be had, or they do not fit each other.
    """
    from mergekit.common import ModelReference

    base, _, adapter = name.partition("+")
    source = locate(base)
    try:
        reference = ModelReference.parse(name)
        made = reference.merged(cache_dir=tempfile.mkdtemp(dir=_workplace()))
    except Exception as error:  # mergekit's, PEFT's, transformers' and the hub's own.
        raise CheckpointError(f"cannot apply {adapter} to {base}: {first_line(error)}") from error
    folder = Path(made.model.path)
    for pattern in TOKENIZER_FILES:
        for file in source.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    return Checkpoint(name, folder, None)
