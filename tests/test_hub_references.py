"""``hub:org/repo/path@revision``: the download, and whatever the hub and the way there can do to it."""

import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from huggingface_hub import constants

from fisher_mask_mergekit import hub as client
from fisher_mask_mergekit.errors import HubError
from fisher_mask_mergekit.store import sidecar_of
from tests.hub_contents import Fault, Hub, Repository
from tests.hub_session import go_offline, new_process, session

CONTENT = bytes(range(256)) * 40
PATH = "fisher/a.safetensors"
GET = f"GET .*/resolve/.*{PATH}"
HEAD = f"HEAD .*/resolve/.*{PATH}"


@pytest.fixture
def naps() -> list[float]:
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Iterator[Hub]:
    with session(tmp_path, monkeypatch, naps) as hub:
        commit(hub, CONTENT)
        yield hub


def commit(hub: Hub, content: bytes) -> str:
    repository = hub.repositories.setdefault("models/org/bert", Repository("org/bert"))
    return repository.commit({PATH: content, "config.json": b"{}"})


def fetch(revision: str = "") -> client.Fetched:
    return client.fetch(client.parse(f"hub:org/bert/{PATH}{revision}"))


def bodies(hub: Hub) -> int:
    return sum(re.match(GET, request) is not None for request in hub.requests)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:org/bert/a.safetensors", ("org/bert", "a.safetensors", None)),
        ("hub:o-r.g/b_1/x/y z.safetensors@refs/pr/1", ("o-r.g/b_1", "x/y z.safetensors", "refs/pr/1")),
    ],
)
def test_a_reference_is_taken_apart_and_written_again(text: str, parts: tuple[str, str, str | None]) -> None:
    found = client.parse(text)
    assert (found.repo, found.path, found.revision) == parts
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "hub:org/bert",
        "hub:bert/a.safetensors",
        "hub:org/bert/../../a.safetensors",
        "hub:org/bert//a.safetensors",
        "hub:org/bert/./a.safetensors",
        "hub:org/bert/a\\b.safetensors",
        "hub:org/bert/a.bin",
        "hub:org/bert/a.safetensors@",
        "hub:org/bert/a.safetensors@x y",
        "hub:/bert/a.safetensors",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(HubError, match=r"is not of the form hub:org/repo/path\.safetensors\[@revision\]$"):
        client.parse(text)


def test_a_file_is_downloaded_once_and_told_with_its_commit(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    sha = hub.repositories["models/org/bert"].branches["main"]
    # As by three tensors of a merge.
    (path,) = {sidecar_of(f"hub:org/bert/{PATH}@main", None) for _ in range(3)}
    assert path is not None
    assert path.read_bytes() == CONTENT
    assert caplog.messages == [
        f"hub:org/bert/{PATH}@main is not pinned to a commit; this is  hub:org/bert/{PATH}@{sha}"
    ]
    assert bodies(hub) == 1
    asked = len(hub.requests)
    new_process()
    assert fetch("@main").path == path
    assert bodies(hub) == 1
    assert len(hub.requests) > asked  # Whether the branch has moved.


def test_a_pinned_file_asks_nobody_once_it_is_here(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    sha = commit(hub, CONTENT)
    first = fetch(f"@{sha}")
    assert first.pinned.revision == sha
    hub.requests.clear()
    new_process()
    assert fetch(f"@{sha}") == first
    assert hub.requests == []
    assert caplog.records == []


def test_a_branch_that_moved_gives_its_new_file_and_the_pinned_one_stays(hub: Hub) -> None:
    old = fetch().pinned.revision
    new = commit(hub, b"moved" * 9)
    new_process()
    assert (fetch().pinned.revision, fetch().path.read_bytes()) == (new, b"moved" * 9)
    assert fetch(f"@{old}").path.read_bytes() == CONTENT


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub) -> None:
    hub.faults = [Fault(GET, cut=True)]
    assert fetch().path.read_bytes() == CONTENT
    assert bodies(hub) == 2


def test_a_download_with_a_flipped_bit_is_downloaded_again(hub: Hub) -> None:
    hub.faults = [Fault(GET, flip=True)]
    assert fetch().path.read_bytes() == CONTENT
    assert bodies(hub) == 2


def test_a_download_that_is_damaged_twice_is_refused_and_not_kept_for_good(hub: Hub) -> None:
    hub.faults = [Fault(GET, times=2, flip=True)]
    with pytest.raises(
        HubError, match=r"was damaged on its way, twice: it has not the hub's checksum\n  run"
    ):
        fetch()
    assert fetch().path.read_bytes() == CONTENT


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(hub: Hub) -> None:
    path = fetch().path
    path.write_bytes(b"rubbish")
    new_process()
    assert fetch().path.read_bytes() == CONTENT


def test_gits_checksum_is_known_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub_contents.is_large", lambda path: False)
    hub.faults = [Fault(GET, flip=True)]
    assert len(fetch().path.readlink().name) == 40
    assert fetch().path.read_bytes() == CONTENT
    assert bodies(hub) == 2


def test_a_file_too_large_for_a_sidecar_is_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_SIDECAR_BYTES", len(CONTENT) - 1)
    with pytest.raises(HubError, match=f"has {len(CONTENT)} bytes, more than .*; that is no sidecar"):
        fetch()
    assert bodies(hub) == 0


def test_too_many_requests_are_waited_for(hub: Hub, naps: list[float]) -> None:
    hub.faults = [
        Fault(each, status=HTTPStatus.TOO_MANY_REQUESTS, headers={"Retry-After": "7"}) for each in (HEAD, GET)
    ]
    assert fetch().path.read_bytes() == CONTENT
    assert naps == [8.0]  # After HEAD the library tries again at once.


STATUSES = [
    (
        HTTPStatus.UNAUTHORIZED,
        {},
        "there is no such repository, or it takes a login\n  check its name, or log in:  hf auth login",
    ),
    (
        HTTPStatus.FORBIDDEN,
        {"X-Error-Code": "GatedRepo"},
        "is gated\n  ask for access on its page, then:  hf auth login",
    ),
    (
        HTTPStatus.FORBIDDEN,
        {},
        "your token may not do this\n  log in with one that may write:  hf auth login",
    ),
    (
        HTTPStatus.TOO_MANY_REQUESTS,
        {"Retry-After": "9"},
        "too many requests from here\n  wait 9 s, then run it again",
    ),
    (HTTPStatus.TOO_MANY_REQUESTS, {}, "\n  wait a while, then run it again"),
    (
        HTTPStatus.BAD_GATEWAY,
        {},
        "cannot be reached or has failed: .*\n  run it again later; with HF_HUB_OFFLINE=1",
    ),
    (HTTPStatus.GONE, {}, "\n  the hub refused the request; see what it says"),
]


@pytest.mark.parametrize(("status", "headers", "message"), STATUSES)
def test_what_the_hub_refuses_is_one_error(
    hub: Hub, status: HTTPStatus, headers: dict[str, str], message: str
) -> None:
    hub.faults = [Fault(HEAD, times=99, status=status, headers=headers)]
    with pytest.raises(HubError, match=f"^cannot fetch hub:org/bert/{PATH}: .*{message}"):
        fetch()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hub:org/none/a.safetensors", "there is no such repository, or it takes a login\n"),
        (f"hub:org/bert/{PATH}@none", "the repository has no such revision\n  name a branch, a tag"),
        ("hub:org/bert/none.safetensors", "the repository has no such file at that revision\n  look at"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, reference: str, message: str) -> None:
    with pytest.raises(HubError, match=f"^cannot fetch {reference}: {message}"):
        sidecar_of(reference, None)


def test_what_is_private_takes_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add("models/org/bert")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(HubError, match="or it takes a login\n  check its name, or log in:  hf auth login"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch().path.read_bytes() == CONTENT


def test_a_hub_that_fails_leaves_what_was_downloaded(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    here = fetch("@main")
    commit(hub, b"moved")
    new_process()
    hub.faults = [Fault(HEAD, times=99, status=HTTPStatus.BAD_GATEWAY)]
    assert fetch("@main") == here
    assert caplog.messages[-1].endswith(f"this is  {here.pinned}")


def test_no_hub_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "http://127.0.0.1:9"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(
        HubError, match=r"^cannot fetch .*: http://127\.0\.0\.1:9 cannot be reached or has failed"
    ):
        fetch()


def test_offline_there_is_what_was_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    here = fetch("@main")
    hub.requests.clear()
    go_offline(monkeypatch)
    assert fetch("@main") == here
    with pytest.raises(
        HubError, match="this takes the network, and HF_HUB_OFFLINE is set\n  run it once with"
    ):
        fetch("@dev")
    assert hub.requests == []


def test_a_full_size_sidecar_is_no_file() -> None:
    with pytest.raises(HubError, match="a full-size sidecar is a folder, not one file\n  download it"):
        sidecar_of("hub:org/bert/diagonal.safetensors", None, "diagonal")
