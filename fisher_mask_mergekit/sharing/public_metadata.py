"""What is published of a sidecar: nothing that says how folders on this machine are called."""

import re
from dataclasses import replace

from fisher_mask_mergekit import store
from fisher_mask_mergekit.settings import RANDOM
from fisher_mask_mergekit.sidecar import Sidecar


def public(sidecar: Sidecar, repo: str, revision: str | None) -> tuple[Sidecar, tuple[str, ...]]:
    """A sidecar without the paths of local folders and files in its metadata.

    Only a commit on the hub tells a hub id from a folder's path: of a name without one, the last part is kept.

    Args:
        sidecar: The sidecar.
        repo: Where it is published.
        revision: The commit there whose weights it was compared with, which a local checkpoint is called by then;
            None if it was not, then a local checkpoint keeps the last part of its name.

    Returns:
        The same measurement, and what was renamed.
    """
    metadata = sidecar.metadata
    data = metadata.settings.data
    known = {}
    if metadata.revision is None:
        public_name = _shortened_checkpoint(metadata.checkpoint)
        known = {"checkpoint": repo if revision else public_name, "revision": revision}
    settings = metadata.settings
    if data is not None and metadata.data.revision is None:
        settings = settings.model_copy(update={"data": _shortened(data)})
    changed = metadata.model_copy(update={**known, "settings": settings})
    pairs = ((metadata.checkpoint, changed.checkpoint), (data, settings.data))
    notes = tuple(f"'{was}' is called '{now}' in what is published" for was, now in pairs if was != now)
    return replace(sidecar, metadata=changed), notes


def _shortened_checkpoint(name: str) -> str:
    """Of a base and its adapter, which no commit is kept of, each one's last part."""
    base, plus, adapter = store.adapted(name) or (name, "", "")
    return _shortened(base) + plus + (_shortened(adapter) if plus else "")


def _shortened(name: str) -> str:
    """A path's last part; a folder that is called as random tokens are stays a folder."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name
    return f"./{last}" if last == RANDOM != name else last
