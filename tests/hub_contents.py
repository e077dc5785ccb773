"""What the hub of :mod:`tests.fake_hub` holds, and what it answers with."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]
"""Path in the repository to content."""


class HubError(Exception):
    """What the hub answers with status 404, or another; clients tell the cases apart by the code."""

    def __init__(
        self,
        code: str,
        message: str,
        commit: str | None = None,
        status: HTTPStatus = HTTPStatus.NOT_FOUND,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit is not None:  # Clients then remember that this commit has no such file.
            self.headers["X-Repo-Commit"] = commit


@dataclass
class Repository:
    """Commits by sha, each with all its files, and the branches that point at them."""

    name: str
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        # The sha follows from the files alone, so that two hubs with the same files agree about it.
        sha = hashlib.sha1("".join(f"{path} {git_oid(files[path])}\n" for path in sorted(files)).encode())
        self.commits[sha.hexdigest()] = files
        self.branches[branch] = sha.hexdigest()
        return sha.hexdigest()

    def at(self, revision: str) -> tuple[str, Files]:
        """The commit that a branch or sha stands for, and its files."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError("RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind.

    Attributes:
        requests: Which: a pattern for their method and path.
        times: How many of them.
        status: What they are answered with instead; None if they are answered.
        headers: Of that answer.
        cut: Whether the connection breaks in the middle of the answer.
        flip: Whether a bit of the answer is flipped.
    """

    requests: str
    times: int = 1
    status: HTTPStatus | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    flip: bool = False


class Hub:
    """The repositories, by ``models/org/name`` or ``datasets/org/name``, and what was asked for.

    Attributes:
        token: What whoever writes, or reads what is private, must send.
        private: The repositories that are.
        lfs: The large files that were uploaded, by SHA-256.
        faults: What goes wrong, and when.
        requests: Method and path of every request so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_author"
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def fault(self, request: str) -> Fault | None:
        """What goes wrong with a request."""
        for fault in self.faults:
            if fault.times and re.match(fault.requests, request):
                fault.times -= 1
                return fault
        return None

    def push(self, key: str, folder: Path) -> str:
        """Make a folder's files the next commit of a repository's main branch; returns its sha."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        name = key.partition("/")[2]
        return self.repositories.setdefault(key, Repository(name)).commit(files)


@dataclass(frozen=True)
class Answer:
    """Body, headers and status of a response."""

    content: bytes
    headers: Mapping[str, str]
    status: HTTPStatus = HTTPStatus.OK


def git_oid(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    """The name of its content in a cache."""
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_oid(content)


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def as_json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), {"Content-Type": "application/json"})
