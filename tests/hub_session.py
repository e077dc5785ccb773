"""The hub library of this very process, pointed at a hub on this machine: quicker than commands of their own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from fisher_mask_mergekit import hub as client
from tests.fake_hub import serve
from tests.hub_contents import Hub


@contextmanager
def session(home: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Iterator[Hub]:
    """A hub, and a user who is logged in and has an empty cache.

    Args:
        home: Where the cache is.
        monkeypatch: Undoes it all.
        naps: Gets the seconds for which the library wanted to wait; it does not.
    """
    hub = Hub()
    with serve(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", naps.append)
        new_process()
        try:
            yield hub
        finally:
            new_process()


def new_process() -> None:
    """What a later command would not know any more."""
    close_session()
    client.fetch.cache_clear()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_process()
