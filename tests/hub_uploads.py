"""The part of :mod:`tests.fake_hub` that writes: repositories, large files, commits and pull requests."""

import base64
import hashlib
import json
from http import HTTPStatus
from typing import Any

from tests.hub_contents import Answer, Hub, HubError, Repository, as_json, etag, is_large


def create(hub: Hub, endpoint: str, wanted: Any) -> Answer:
    name = f"{wanted['organization']}/{wanted['name']}"
    hub.repositories[f"models/{name}"] = Repository(name)
    hub.repositories[f"models/{name}"].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    if "private" in (wanted.get("visibility"), "private" if wanted.get("private") else None):
        hub.private.add(f"models/{name}")
    return as_json({"url": f"{endpoint}/{name}", "name": name})


def preupload(repository: Repository, revision: str, wanted: Any) -> Answer:
    _, files = repository.at(revision)
    return as_json(
        {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": etag(path, files[path]) if path in files else None,
                }
                for path in (file["path"] for file in wanted["files"])
            ]
        }
    )


def batch(hub: Hub, endpoint: str, wanted: Any) -> Answer:
    """Where to put large files; nowhere, if they are here already."""
    objects = []
    for one in wanted["objects"]:
        upload = {"upload": {"href": f"{endpoint}/lfs/{one['oid']}", "header": {}}}
        objects.append(one if one["oid"] in hub.lfs else one | {"actions": upload})
    return as_json({"transfer": "basic", "objects": objects})


def store(hub: Hub, oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubError("", "the content has not that SHA-256", status=HTTPStatus.BAD_REQUEST)
    hub.lfs[oid] = content
    return as_json({})


def commit(hub: Hub, repository: Repository, revision: str, body: bytes, is_pr: bool, url: str) -> Answer:
    sha, files = repository.at(revision)
    changed = dict(files)
    for line in map(json.loads, body.splitlines()):
        match line:
            case {"key": "header", "value": header}:
                if not is_pr and header.get("parentCommit", sha) != sha:
                    raise HubError("", "A commit has happened since", status=HTTPStatus.PRECONDITION_FAILED)
            case {"key": "file", "value": {"path": path, "content": content}}:
                changed[path] = base64.b64decode(content)
            case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                changed[path] = hub.lfs[oid]
    number = len(repository.branches)
    made = repository.commit(changed, f"refs/pr/{number}" if is_pr else revision)
    reply = {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}"}
    return as_json(reply | ({"pullRequestUrl": f"{url}/discussions/{number}"} if is_pr else {}))
