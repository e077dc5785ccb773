"""Where sidecars live: where the recipe says, beside the checkpoint, or in the cache."""

import hashlib
import os
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


def find(checkpoint: Checkpoint) -> Path | None:
    """The sidecar beside the checkpoint, else the one in the cache, else None."""
    places = (checkpoint.folder / BESIDE, cached(checkpoint))
    return next((place for place in places if place.is_file()), None)


def destination(checkpoint: Checkpoint) -> Path:
    """Where ``compute`` writes: beside a local checkpoint; to the cache for a hub id or a read-only folder."""
    if checkpoint.revision is None and os.access(checkpoint.folder, os.W_OK):
        return checkpoint.folder / BESIDE
    return cached(checkpoint)
