"""A checkpoint without its weights: its configuration, its sidecar, and what its tensors are called."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from fisher_mask_mergekit.checkpoint import (
    Checkpoint,
    check_sizes,
    locate,
    stored_shapes,
)
from fisher_mask_mergekit.errors import CheckpointError, first_line
from fisher_mask_mergekit.skeleton import Shapes, architecture_of, named_skeleton
from fisher_mask_mergekit.store import BESIDE, adapted


@dataclass(frozen=True)
class Peeked:
    """What can be known of a checkpoint without downloading its weights.

    Attributes:
        checkpoint: Where its configuration is, and its sidecar if there is one beside it.
        shapes: Names and shapes of its tensors as its files have them; None if only a download would tell.
        readable: Whether the weights are on this machine.
    """

    checkpoint: Checkpoint
    shapes: Shapes | None
    readable: bool

    @property
    def architecture(self) -> str:
        """The class that its configuration names."""
        return architecture_of(self.checkpoint)

    @property
    def is_foreign(self) -> bool:
        """Whether its class is not in transformers, but in code of the checkpoint's own."""
        import transformers

        return getattr(transformers, self.architecture, None) is None

    def model(self) -> Any:
        """The model on torch's meta device, None if its class is not in transformers.

        Raises:
            CheckpointError: If transformers cannot make it.
        """
        return named_skeleton(self.checkpoint)


def peek(name: str) -> Peeked:
    """Look at a checkpoint; of a hub id, nothing is downloaded but the configuration and the sidecar.

    Args:
        name: Local folder, or hub id with or without ``@revision``. With ``+adapter`` behind it, its base is
            looked at: the tensors have the same names and shapes, the values are not known.

    Raises:
        CheckpointError: If there is no such checkpoint, or it has no configuration or no weights.
    """
    if reference := adapted(name):
        found = peek(reference[0])
        return Peeked(Checkpoint(name, found.checkpoint.folder, None), found.shapes, False)
    path, _, wanted = name.partition("@")
    local = Path(name).exists() or name.startswith((".", "/", "~"))
    checkpoint = locate(name) if local else _from_hub(name, path, wanted or None)
    try:
        return Peeked(checkpoint, stored_shapes(checkpoint), True)
    except CheckpointError:
        if local:
            raise
        return Peeked(checkpoint, _shapes_on_hub(path, checkpoint.revision), False)


def _from_hub(name: str, path: str, revision: str | None) -> Checkpoint:
    try:
        folder = Path(hf_hub_download(path, "config.json", revision=revision)).parent
    except Exception as error:  # The hub library raises its own, the HTTP library's and ValueErrors.
        raise CheckpointError(
            f"{name} is neither a folder here nor a checkpoint to be had from the hub: {first_line(error)}"
        ) from error
    # Where it is not published, it may be in the cache.
    with suppress(EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        hf_hub_download(path, BESIDE.as_posix(), revision=folder.name)
    checkpoint = Checkpoint(name, folder, folder.name)
    check_sizes(checkpoint)
    return checkpoint


def _shapes_on_hub(path: str, revision: str | None) -> Shapes | None:
    """From the headers of the weight files, which take a request of some kilobytes each."""
    try:
        found = HfApi().get_safetensors_metadata(path, revision=revision)
    except Exception:  # As above; or the weights are no safetensors, or the hub cannot be reached.
        return None
    return {
        name: tuple(tensor.shape)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def same_weights(path: str, one: str, other: str) -> bool | None:
    """Whether two commits of a repository on the hub have the same weight files; None if nobody can tell."""
    files = []
    try:
        for revision in (one, other):
            entries = HfApi().list_repo_tree(path, revision=revision)
            files.append(
                {
                    entry.path: entry.blob_id
                    for entry in entries
                    if isinstance(entry, RepoFile) and entry.path.endswith((".safetensors", ".bin"))
                }
            )
    except Exception:  # As above.
        return None
    return files[0] == files[1]
