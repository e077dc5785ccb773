"""Where sidecars live: where the recipe says, beside the checkpoint, or in the cache."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from fisher_mask_mergekit.checkpoint import Checkpoint

# A subfolder, because some inference servers load every .safetensors file at the top level.
BESIDE = Path("fisher") / "mask_fisher.safetensors"


def cache_folder() -> Path:
    """``$FISHER_MASK_CACHE``, else ``fisher-mask-mergekit`` in the user's cache directory."""
    chosen = os.environ.get("FISHER_MASK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fisher-mask-mergekit"


def cached(checkpoint: Checkpoint) -> Path:
    """The checkpoint's place in the cache, keyed by id and revision, or by path for a local folder."""
    if checkpoint.revision is None:
        path = str(checkpoint.folder.resolve())
        key = f"local--{checkpoint.folder.resolve().name}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    else:
        key = f"{checkpoint.name.partition('@')[0].replace('/', '--')}--{checkpoint.revision}"
    return cache_folder() / key / BESIDE.name


def find_all(checkpoint: Checkpoint) -> Iterator[Path]:
    """The checkpoint's sidecars in the order a merge prefers them: beside it, then in the cache."""
    if (beside := checkpoint.folder / BESIDE).is_file():
        yield beside
    if (kept := cached(checkpoint)).is_file():
        yield kept


def find(checkpoint: Checkpoint) -> Path | None:
    """The sidecar that a merge uses unless the recipe names one."""
    # Asked for every tensor of a merge: what comes second is not looked up where there is a first.
    return next(find_all(checkpoint), None)


def destination(checkpoint: Checkpoint) -> Path:
    """Where ``compute`` writes: beside a local checkpoint; to the cache if that is a hub id or read-only."""
    if checkpoint.revision is None and os.access(checkpoint.folder, os.W_OK):
        return checkpoint.folder / BESIDE
    return cached(checkpoint)
