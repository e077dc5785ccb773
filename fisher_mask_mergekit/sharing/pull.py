"""`mergekit-fisher pull`: somebody else's sidecar, compared with the weights that it lies beside."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.errors import HubError, SidecarError
from fisher_mask_mergekit.preview.inspection import read_masks
from fisher_mask_mergekit.sharing.hub_weights import compare_with_hub
from fisher_mask_mergekit.sidecar import Sidecar, may_replace


@dataclass(frozen=True)
class Pulled:
    """A sidecar from the hub.

    Attributes:
        sidecar: What it holds.
        path: Where it is now.
        reference: Where it came from, at its commit.
        note: Why it was not compared with weights; empty if it was.
    """

    sidecar: Sidecar
    path: Path
    reference: hub.HubReference
    note: str


def pull(target: str, out: Path | None = None) -> Pulled:
    """Fetch a sidecar from the hub.

    Args:
        target: A checkpoint's hub id, with or without ``@revision``, or a reference ``hub:...``.
        out: Where to write a copy.

    Raises:
        HubError: If it cannot be had.
        SidecarError: If it is no sidecar, is not that of the weights in its repository, or cannot be written.
    """
    fetched = hub.fetch(_reference(target))
    sidecar, note = read_masks(fetched.path), ""
    assert fetched.pinned.revision is not None
    if is_offline_mode():
        note = "HF_HUB_OFFLINE is set: it was not compared with the weights on the hub"
    elif compare_with_hub(sidecar, fetched.pinned.repo, fetched.pinned.revision) is None:
        note = f"{fetched.pinned.repo} has no weights in safetensors, so it was not compared with any; a merge does that"
    if out is None:
        return Pulled(sidecar, fetched.path, fetched.pinned, note)
    if not may_replace(out):
        raise SidecarError(f"{out} exists and is no sidecar; it was left as it is")
    try:
        store.write_whole(out, fetched.path.read_bytes())
    except OSError as error:
        raise SidecarError(f"cannot write {out}: {error.strerror or error}; nothing was written") from error
    return Pulled(sidecar, out, fetched.pinned, note)


def _reference(target: str) -> hub.HubReference:
    if target.startswith(hub.PREFIX):
        return hub.parse(target)
    if Path(target).exists():
        raise HubError(f"{target} is here already; pull takes a hub id, or hub:ORG/NAME/PATH.safetensors")
    repo, _, revision = target.partition("@")
    hub.check_repository(repo)
    return hub.HubReference(repo, store.BESIDE.as_posix(), revision or None)
