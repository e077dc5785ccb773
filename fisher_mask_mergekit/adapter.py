"""References of the form ``base+adapter``: the checkpoint that mergekit makes of them."""

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from fisher_mask_mergekit.checkpoint import TOKENIZER_FILES, Checkpoint, locate
from fisher_mask_mergekit.errors import CheckpointError, first_line
from fisher_mask_mergekit.store import cache_folder


@lru_cache
def _workplace() -> tempfile.TemporaryDirectory[str]:
    """Merged checkpoints are as large as their bases: they go when the program ends."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cache_folder(), prefix="adapted-")


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
        made = reference.merged(cache_dir=tempfile.mkdtemp(dir=_workplace().name))
    except Exception as error:  # mergekit's, PEFT's, transformers' and the hub's own.
        raise CheckpointError(f"cannot apply {adapter} to {base}: {first_line(error)}") from error
    folder = Path(made.model.path)
    for pattern in TOKENIZER_FILES:
        for file in source.folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    return Checkpoint(name, folder, None)
