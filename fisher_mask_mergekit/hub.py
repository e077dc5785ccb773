"""Sidecars in any repository on the hub: ``hub:org/repo/path.safetensors[@revision]``."""

import hashlib
import logging
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download

from fisher_mask_mergekit.errors import HubError
from fisher_mask_mergekit.hub_errors import hub_errors
from fisher_mask_mergekit.untrusted import MOST_SIDECAR_BYTES

PREFIX = "hub:"
_REPO = r"[\w.-]+/[\w.-]+"
_FORM = re.compile(rf"hub:(?P<repo>{_REPO})/(?P<path>[^@\\]+\.safetensors)(@(?P<revision>[^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB_HASHES = {40: "sha1", 64: "sha256"}


@dataclass(frozen=True)
class HubReference:
    """A file in a repository.

    Attributes:
        repo: The repository's id.
        path: The file's path in it.
        revision: Branch, tag or commit; None for the main branch.
    """

    repo: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}/{self.path}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Fetched:
    """A downloaded file.

    Attributes:
        path: Where it is, in the hub library's cache.
        pinned: What was asked for, at the commit that it is of.
    """

    path: Path
    pinned: HubReference


def parse(text: str) -> HubReference:
    """Parse a reference.

    Raises:
        HubError: If it is none.
    """
    found = _FORM.fullmatch(text)
    if found is None or not {"", ".", ".."}.isdisjoint(found["path"].split("/")):
        raise HubError(f"'{text}' is not of the form hub:org/repo/path.safetensors[@revision]")
    return HubReference(found["repo"], found["path"], found["revision"])


def check_repository(text: str) -> None:
    """Refuse what is no repository's id.

    Raises:
        HubError: If it is not of the form ORG/NAME.
    """
    if not re.fullmatch(_REPO, text):
        raise HubError(f"'{text}' is no id of a repository on the hub, ORG/NAME")


@lru_cache
def fetch(reference: HubReference) -> Fetched:
    """Download a file, once per process; what is in the hub library's cache is not downloaded again.

    A file that has not the checksum that the hub gave is downloaded once more. Of what is not pinned to a commit, the
    commit is told. Where the hub does not answer, that is the one that was downloaded last.

    Raises:
        HubError: If it cannot be had, is too large, or does not arrive as the hub has it.
    """
    with hub_errors(f"cannot fetch {reference}"):
        plan = hf_hub_download(reference.repo, reference.path, revision=reference.revision, dry_run=True)
        if (plan.file_size or 0) > MOST_SIDECAR_BYTES:
            raise HubError(
                f"{reference} has {plan.file_size} bytes, more than {MOST_SIDECAR_BYTES}; that is no sidecar"
            )
        path = _download(reference, again=False)
        if not _is_whole(path):
            path = _download(reference, again=True)
    if not _is_whole(path):
        raise HubError(
            f"{reference} was damaged on its way, twice: it has not the hub's checksum\n  run it again"
        )
    pinned = replace(reference, revision=path.parents[len(PurePosixPath(reference.path).parts) - 1].name)
    if not _COMMIT.fullmatch(reference.revision or ""):
        logging.getLogger(__name__).warning("%s is not pinned to a commit; this is  %s", reference, pinned)
    return Fetched(path, pinned)


def _download(reference: HubReference, *, again: bool) -> Path:
    return Path(
        hf_hub_download(reference.repo, reference.path, revision=reference.revision, force_download=again)
    )


def _is_whole(path: Path) -> bool:
    """Whether a file has the checksum by which the cache calls it: git's of a small file, SHA-256 of a large one.

    Without symbolic links the cache does not say; then only the sidecar's own checks are left.
    """
    if not path.is_symlink():
        return True
    name, content = path.readlink().name, path.read_bytes()
    if len(name) == 40:
        content = b"blob %d\0" % len(content) + content
    algorithm = _BLOB_HASHES.get(len(name))
    return algorithm is None or hashlib.new(algorithm, content).hexdigest() == name
