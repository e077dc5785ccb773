"""A hub of models and data sets on this machine: as much of the HTTP interface as a download needs.

Commands meet it as they meet the real one, in processes of their own with ``HF_ENDPOINT`` set.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]
"""Path in the repository to content."""


class HubError(Exception):
    """What the hub answers with status 404; clients tell the cases apart by the code."""

    def __init__(self, code: str, message: str, commit: str | None = None) -> None:
        super().__init__(message)
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
        sha = hashlib.sha1("".join(f"{path} {_oid(files[path])}\n" for path in sorted(files)).encode())
        self.commits[sha.hexdigest()] = files
        self.branches[branch] = sha.hexdigest()
        return sha.hexdigest()

    def at(self, revision: str) -> tuple[str, Files]:
        """The commit that a branch or sha stands for, and its files."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError("RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


class Hub:
    """The repositories, by ``models/org/name`` or ``datasets/org/name``, and what was asked for.

    Attributes:
        requests: Method and path of every request so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

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


def answer(hub: Hub, method: str, url: str, body: bytes, byte_range: str | None) -> Answer:
    """Find out what is asked for, and give it."""
    query = parse_qs(urlsplit(url).query)
    match [unquote(part) for part in urlsplit(url).path.strip("/").split("/")]:
        case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
            key = f"{kind}/{owner}/{name}"
        case ["datasets", owner, name, "resolve", *path]:
            key, rest = f"datasets/{owner}/{name}", ["resolve", *path]
        case [owner, name, "resolve", *path]:
            key, rest = f"models/{owner}/{name}", ["resolve", *path]
        case _:
            raise HubError("NotFound", f"this hub does not know {method} {url}")
    if key not in hub.repositories:
        raise HubError("RepoNotFound", "Repository not found")
    repository = hub.repositories[key]
    match (method, *rest):
        case ("GET",):
            return _info(repository, "main")
        case ("GET", "revision", revision):
            return _info(repository, revision)
        case ("GET", "tree", revision, *path):
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return _tree(repository, revision, "/".join(path), recursive)
        case ("POST", "paths-info", revision):
            entries = _entries(repository.at(revision)[1])
            return _json([entries[path] for path in parse_qs(body.decode())["paths"] if path in entries])
        case ("GET" | "HEAD", "resolve", revision, *path):
            return _file(repository, revision, "/".join(path), byte_range)
    raise HubError("NotFound", f"this hub does not know {method} {url}")


def _info(repository: Repository, revision: str) -> Answer:
    sha, files = repository.at(revision)
    return _json({"id": repository.name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})


def _tree(repository: Repository, revision: str, top: str, recursive: bool) -> Answer:
    sha, files = repository.at(revision)
    found = []
    for path, entry in _entries(files).items():
        above = PurePosixPath(path).parents
        if PurePosixPath(top) in (above if recursive else above[:1]):
            found.append(entry)
    if top and not found:
        raise HubError("EntryNotFound", f"{top} does not exist on {revision}", sha)
    return _json(found)


def _file(repository: Repository, revision: str, path: str, byte_range: str | None) -> Answer:
    sha, files = repository.at(revision)
    if path not in files:
        raise HubError("EntryNotFound", f"{path} does not exist on {revision}", sha)
    content = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
    if byte_range is None:
        return Answer(content, headers)
    # Clients resume with 'bytes=first-' and read a block with 'bytes=first-last'.
    first, _, last = byte_range.removeprefix("bytes=").partition("-")
    part = content[int(first) : int(last) + 1 if last else None]
    headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
    return Answer(part, headers, HTTPStatus.PARTIAL_CONTENT)


def _entries(files: Files) -> dict[str, dict[str, Any]]:
    """Files, and the folders that they lie in, as the hub lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            entries[folder] = {"type": "directory", "path": folder, "oid": _oid(folder.encode()), "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": _oid(content), "size": len(content)}
    return entries


def _oid(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), {"Content-Type": "application/json"})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # Clients keep the connection.

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            reply = answer(self.hub, self.command, self.path, body, self.headers.get("Range"))
        except HubError as error:
            reply = Answer(json.dumps({"error": str(error)}).encode(), error.headers, HTTPStatus.NOT_FOUND)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content)

    do_GET = do_HEAD = do_POST = _serve  # noqa: N815 - the names that http.server looks for.

    def log_message(self, format: str, *values: Any) -> None:
        """Not to standard error: the hub's ``requests`` has them."""


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve a hub while the context lasts; gives the endpoint's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
