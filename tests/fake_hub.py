"""A hub of models and data sets on this machine: as much of the HTTP interface as downloads and uploads need.

Commands meet it as they meet the real one, in processes of their own with ``HF_ENDPOINT`` set.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests import hub_uploads as uploads
from tests.hub_contents import Answer, Fault, Files, Hub, HubError, Repository, as_json, etag, git_oid


@dataclass(frozen=True)
class Request:
    """What is asked for, and where the hub is."""

    method: str
    url: str
    body: bytes
    byte_range: str | None
    token: str | None
    endpoint: str


def answer(hub: Hub, request: Request) -> Answer:
    """Find out what is asked for, and give it."""
    method, url, body = request.method, request.url, request.body
    query = parse_qs(urlsplit(url).query)
    is_author = request.token == f"Bearer {hub.token}"
    if method in ("POST", "PUT") and "paths-info" not in url and not (is_author or url.startswith("/lfs/")):
        raise HubError("", "Invalid username or password.", status=HTTPStatus.UNAUTHORIZED)
    match [unquote(part) for part in urlsplit(url).path.strip("/").split("/")]:
        case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
            key = f"{kind}/{owner}/{name}"
        case ["datasets", owner, name, "resolve", *path]:
            key, rest = f"datasets/{owner}/{name}", ["resolve", *path]
        case [owner, name, "resolve", *path]:
            key, rest = f"models/{owner}/{name}", ["resolve", *path]
        case ["api", "validate-yaml"]:
            return as_json({})
        case ["api", "repos", "create"]:
            return uploads.create(hub, request.endpoint, json.loads(body))
        case [_, _, "info", "lfs", "objects", "batch"]:
            return uploads.batch(hub, request.endpoint, json.loads(body))
        case ["lfs", oid]:
            return uploads.store(hub, oid, body)
        case _:
            raise HubError("NotFound", f"this hub does not know {method} {url}")
    if key not in hub.repositories or (key in hub.private and not is_author):
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
            return as_json([entries[path] for path in parse_qs(body.decode())["paths"] if path in entries])
        case ("GET" | "HEAD", "resolve", revision, *path):
            return _file(repository, revision, "/".join(path), request.byte_range)
        case ("POST", "preupload", revision):
            return uploads.preupload(repository, revision, json.loads(body))
        case ("POST", "commit", revision):
            is_pr = "create_pr" in query
            return uploads.commit(
                hub, repository, revision, body, is_pr, f"{request.endpoint}/{repository.name}"
            )
    raise HubError("NotFound", f"this hub does not know {method} {url}")


def _info(repository: Repository, revision: str) -> Answer:
    sha, files = repository.at(revision)
    return as_json({"id": repository.name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})


def _tree(repository: Repository, revision: str, top: str, recursive: bool) -> Answer:
    sha, files = repository.at(revision)
    found = []
    for path, entry in _entries(files).items():
        above = PurePosixPath(path).parents
        if PurePosixPath(top) in (above if recursive else above[:1]):
            found.append(entry)
    if top and not found:
        raise HubError("EntryNotFound", f"{top} does not exist on {revision}", sha)
    return as_json(found)


def _file(repository: Repository, revision: str, path: str, byte_range: str | None) -> Answer:
    sha, files = repository.at(revision)
    if path not in files:
        raise HubError("EntryNotFound", f"{path} does not exist on {revision}", sha)
    content = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
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
            entries[folder] = {
                "type": "directory",
                "path": folder,
                "oid": git_oid(folder.encode()),
                "size": 0,
            }
        entries[path] = {"type": "file", "path": path, "oid": git_oid(content), "size": len(content)}
    return entries


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # Clients keep the connection.

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request) or Fault(request)
        reply = self._reply(fault, body)
        content = reply.content
        if fault.flip:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault.cut else content)
        self.close_connection = self.close_connection or fault.cut

    def _reply(self, fault: Fault, body: bytes) -> Answer:
        if fault.status is not None:
            return Answer(b"{}", fault.headers, fault.status)
        request = Request(
            self.command,
            self.path,
            body,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            f"http://{self.headers['Host']}",
        )
        try:
            return answer(self.hub, request)
        except HubError as error:
            return Answer(json.dumps({"error": str(error)}).encode(), error.headers, error.status)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names that http.server looks for.

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
