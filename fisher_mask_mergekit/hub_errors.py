"""What the hub, its client library and the way there can say, as one error with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

# HTTPError is the HTTP library's own, which is httpx or httpx2 by the client's version.
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fisher_mask_mergekit.errors import FisherMaskError, HubError, first_line


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn whatever goes wrong at the hub or on the way there into one error.

    Args:
        what: What was not done then, for the message.

    Raises:
        HubError: In place of any error that is not this package's own.
    """
    try:
        yield
    except FisherMaskError:
        raise
    except (
        Exception
    ) as error:  # The hub library raises its own, the HTTP library's, OSErrors and ValueErrors.
        why, remedy = _explain(_origin(error))
        raise HubError(f"{what}: {why}\n  {remedy}") from error


def _origin(error: BaseException) -> BaseException:
    """What happened, where the client library says only that a file is not in its cache, or not uploaded."""
    known = isinstance(error, HTTPError | OfflineModeIsEnabled)
    return error if known or error.__cause__ is None else _origin(error.__cause__)


def _explain(error: BaseException) -> tuple[str, str]:
    """What it was, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return "this takes the network, and HF_HUB_OFFLINE is set", "run it once with HF_HUB_OFFLINE=0"
    if isinstance(error, GatedRepoError):
        return "the repository is gated", "ask for access on its page, then:  hf auth login"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision", "name a branch, a tag or a commit that it has"
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file at that revision", "look at its list of files on the hub"
    if isinstance(error, RepositoryNotFoundError) or status == 401:  # The hub does not tell these apart.
        return "there is no such repository, or it takes a login", "check its name, or log in:  hf auth login"
    if status == 403:
        return "your token may not do this", "log in with one that may write:  hf auth login"
    if status == 412:
        return "the repository was changed in the meantime; nothing was written", "run it again"
    if isinstance(error, HfHubHTTPError) and status == 429:
        seconds = error.response.headers.get("Retry-After")
        return (
            "the hub has had too many requests from here",
            f"wait {f'{seconds} s' if seconds else 'a while'}, then run it again",
        )
    if status is not None and status < 500:
        return first_line(error), "the hub refused the request; see what it says"
    if isinstance(error, HTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached or has failed: {first_line(error)}",
            "run it again later; with HF_HUB_OFFLINE=1, what was downloaded before is used",
        )
    return first_line(error), "see what it says, then run it again"
