"""Sidecars of any kind, opened by whatever a user names them by."""

from pathlib import Path

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.checkpoint import Checkpoint
from fisher_mask_mergekit.diagonal_sidecar import INDEX, DiagonalSidecar, read_diagonal
from fisher_mask_mergekit.errors import SidecarNotFoundError
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar, is_factored, read_factored
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sidecar import Sidecar, read

AnySidecar = Sidecar | FactoredSidecar | DiagonalSidecar


def is_diagonal(path: Path) -> bool:
    """Whether a full-size sidecar lies there, which is a folder."""
    return (path / INDEX).is_file()


def kind_at(path: Path) -> Kind:
    """Of which kind a sidecar says that it is; of mask nodes, if it says nothing."""
    if is_diagonal(path):
        return "diagonal"
    return "factored" if is_factored(path) else "mask"


def read_any(path: Path, kind: Kind | None = None) -> AnySidecar:
    """Read a sidecar.

    Args:
        path: Where it is.
        kind: What it must be; whatever it is, if not given.

    Raises:
        SidecarError: If it is none of that kind.
    """
    kind = kind or kind_at(path)
    if kind == "mask":
        return read(path)
    return read_factored(path) if kind == "factored" else read_diagonal(path)


def open_sidecar(target: str) -> AnySidecar:
    """The sidecar that a user names.

    Args:
        target: The sidecar itself, on the hub (``hub:``) or here; or the folder of the checkpoint that it belongs to: of
            several kinds there, that of mask nodes before that of rows and columns.

    Raises:
        SidecarNotFoundError: If that checkpoint has none.
        SidecarError: If it cannot be had or read.
    """
    if target.startswith(hub.PREFIX):
        return read_any(hub.fetch(hub.parse(target)).path)
    path = Path(target)
    if not path.is_dir() or is_diagonal(path):
        return read_any(path)
    checkpoint = Checkpoint(target, path, None)
    for kind in store.PLACES:
        if found := store.find(checkpoint, kind):
            return read_any(found, kind)
    raise SidecarNotFoundError(
        f"there is no sidecar for {path}. Measure it:  mergekit-fisher compute {path} --data DATASET"
    )
