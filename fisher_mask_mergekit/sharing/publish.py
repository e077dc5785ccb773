"""`mergekit-fisher push`: a sidecar and the card's section about it, in one commit."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from fisher_mask_mergekit import store
from fisher_mask_mergekit.errors import HubError, SidecarError, SidecarNotFoundError
from fisher_mask_mergekit.hub import HubReference, check_repository, fetch
from fisher_mask_mergekit.hub_errors import hub_errors
from fisher_mask_mergekit.opening import is_diagonal
from fisher_mask_mergekit.preview.peek import peek
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sharing.card import describe, with_section, with_tags
from fisher_mask_mergekit.sharing.hub_weights import compare_with_hub
from fisher_mask_mergekit.sharing.public_metadata import public
from fisher_mask_mergekit.sidecar import Sidecar, read, whole, write

_CARD = "README.md"
_PATH = store.BESIDE.as_posix()


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        url: Of the commit, or of the pull request.
        reference: The sidecar at that commit.
        notes: What the user should know about it.
    """

    url: str
    reference: HubReference
    notes: tuple[str, ...]


def find_measured(target: str) -> Sidecar:
    """The sidecar to publish: a file, or what was measured of a checkpoint.

    Args:
        target: A sidecar's file, a checkpoint's folder, or its hub id; of that, what is in the cache comes before what
            is published already.

    Raises:
        FisherMaskError: If there is none, it cannot be read, or it is of a share of the samples.
    """
    if Path(target).is_file():
        return whole(read(Path(target)))
    if is_diagonal(Path(target)):
        raise SidecarError(_not_taken("diagonal", target))
    checkpoint = peek(target).checkpoint
    found = list(store.find_all(checkpoint))
    if not found:
        others = {kind: store.find(checkpoint, kind) for kind in _OTHERS}
        known = "".join(f" ({_not_taken(kind, path)})" for kind, path in others.items() if path)
        raise SidecarNotFoundError(
            f"there is no sidecar of mask nodes for {target}{known}. Measure it:  "
            f"mergekit-fisher compute {target} --data DATASET"
        )
    return whole(read(found[0 if checkpoint.revision is None else -1]))


_OTHERS: Mapping[Kind, str] = {
    "factored": "a sidecar of rows and columns, which say more of their data",
    "diagonal": "a full-size sidecar, as large as the weights",
}


def _not_taken(kind: Kind, path: object) -> str:
    return f"{path} is {_OTHERS[kind]}: push takes those of mask nodes only"


def publish(sidecar: Sidecar, repo: str, *, create_pr: bool = False, private: bool = False) -> Published:
    """Put a sidecar into a repository and a section about it into the repository's card.

    It is compared with the repository's weights before. A repository that does not exist is made. What somebody
    else commits meanwhile is not overwritten: then nothing is written.

    Args:
        sidecar: The sidecar.
        repo: The repository's id.
        create_pr: Open a pull request instead of committing to the main branch.
        private: Whether a new repository is private.

    Raises:
        SidecarMismatchError: If it was measured on other weights than the repository has.
        HubError: If the hub refuses, the card cannot be changed, or a repository without weights has another
            checkpoint's sidecar already.
    """
    check_repository(repo)
    head = _head(repo, create_pr=create_pr, private=private)
    assert head.sha is not None
    compared = compare_with_hub(sidecar, repo, head.sha)
    pickled = [
        file.rfilename for file in head.siblings or () if fnmatch(file.rfilename, "pytorch_model*.bin")
    ]
    if compared is None and pickled:
        raise HubError(
            f"{repo} has its weights in {pickled[0]}, which mergekit does not download where there is a .safetensors file\n"
            "  push to a repository of its own; recipes name it by  sidecar: hub:..."
        )
    if compared is None:
        _refuse_other(sidecar, repo, head)
    sidecar, notes = public(sidecar, repo, head.sha if compared else None)
    if compared is None:
        notes += (f"{repo} has no weights in safetensors, so it was not compared with any",)
    section = describe(sidecar.metadata, repo, _PATH, is_beside=compared is not None)
    card = with_tags(with_section(_card(repo, head.sha), section))
    with tempfile.TemporaryDirectory() as folder, hub_errors(f"cannot push to {repo}"):
        file = Path(folder) / store.BESIDE.name
        write(sidecar, file)
        done = HfApi().create_commit(
            repo,
            [CommitOperationAdd(_PATH, file), CommitOperationAdd(_CARD, card.encode())],
            commit_message="Fisher information of mask nodes, for merging",
            parent_commit=head.sha,
            create_pr=create_pr,
        )
    return Published(done.pr_url or done.commit_url, HubReference(repo, _PATH, done.oid), notes)


def _head(repo: str, *, create_pr: bool, private: bool) -> ModelInfo:
    """The repository's main branch; made if there is no such repository."""
    with hub_errors(f"cannot push to {repo}"):
        try:
            return HfApi().model_info(repo)
        except RepositoryNotFoundError:
            if create_pr:
                raise
        HfApi().create_repo(repo, private=private or None)  # Some organisations' default is private.
        return HfApi().model_info(repo)


def _refuse_other(sidecar: Sidecar, repo: str, head: ModelInfo) -> None:
    """Refuse to replace the sidecar of another checkpoint; what cannot be read as one is replaced.

    Raises:
        HubError: If there is one, or it cannot be fetched.
    """
    if _PATH not in {file.rfilename for file in head.siblings or ()}:
        return
    path = fetch(HubReference(repo, _PATH, head.sha)).path
    try:
        there = read(path).metadata
    except SidecarError:
        return
    if there.weights != sidecar.metadata.weights:
        raise HubError(
            f"{repo} has the sidecar of another checkpoint, {there.described_checkpoint}; it was left as it is\n"
            f"  push that of {sidecar.metadata.described_checkpoint} to a repository of its own"
        )


def _card(repo: str, commit: str) -> str:
    """The card's text, byte for byte; empty only if the hub says that there is none."""
    with hub_errors(f"cannot read the card of {repo}"):
        try:
            return Path(hf_hub_download(repo, _CARD, revision=commit)).read_bytes().decode()
        except RemoteEntryNotFoundError:
            return ""
        except UnicodeDecodeError as error:
            raise HubError(
                f"{repo}: README.md is not UTF-8; write it anew in UTF-8 and push again"
            ) from error
