"""Sidecars of either kind, opened by whatever a user names them by."""

from pathlib import Path

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.checkpoint import Checkpoint
from fisher_mask_mergekit.diagonal_sidecar import INDEX, DiagonalSidecar, read_diagonal
from fisher_mask_mergekit.errors import SidecarNotFoundError
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sidecar import Sidecar, read

AnySidecar = Sidecar | DiagonalSidecar


def is_diagonal(path: Path) -> bool:
    """Whether a full-size sidecar lies there, which is a folder."""
    return (path / INDEX).is_file()


def read_any(path: Path, kind: Kind) -> AnySidecar:
    """Read a sidecar of either kind.

    Raises:
        SidecarError: If it is none of that kind.
    """
    return read(path) if kind == "mask" else read_diagonal(path)


def open_sidecar(target: str) -> AnySidecar:
    """The sidecar that a user names.

    Args:
        target: The sidecar itself, on the hub (``hub:``) or here; or the folder of the checkpoint that it belongs to: of
            two kinds there, that of mask nodes.

    Raises:
        SidecarNotFoundError: If that checkpoint has none.
        SidecarError: If it cannot be had or read.
    """
    if target.startswith(hub.PREFIX):
        return read(hub.fetch(hub.parse(target)).path)
    path = Path(target)
    if is_diagonal(path):
        return read_diagonal(path)
    if not path.is_dir():
        return read(path)
    checkpoint = Checkpoint(target, path, None)
    kinds: tuple[Kind, ...] = ("mask", "diagonal")
    for kind in kinds:
        if found := store.find(checkpoint, kind):
            return read_any(found, kind)
    raise SidecarNotFoundError(
        f"there is no sidecar for {path}. Measure it:  mergekit-fisher compute {path} --data DATASET"
    )
