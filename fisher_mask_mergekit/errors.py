"""The errors a user can meet. Each message says what happened, where, and what to do about it."""

import re

from fisher_mask_mergekit.shown import shown


class FisherMaskError(Exception):
    """Base class of all errors raised on bad input. Its text is fit to be shown, whatever it was made of."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class RecipeError(FisherMaskError):
    """The recipe, or an option, cannot be used."""


class CheckpointError(FisherMaskError):
    """A checkpoint cannot be found, read, or measured."""


class DataError(FisherMaskError):
    """The data set cannot be found, read, or matched to the checkpoint."""


class MeasurementError(FisherMaskError):
    """The pre-pass gave no usable number."""


class SidecarError(FisherMaskError):
    """A sidecar cannot be read or written."""


class SidecarMismatchError(SidecarError):
    """A sidecar was not measured on the checkpoint it is used for."""


class SidecarShareError(SidecarError):
    """A sidecar is of a share of the samples, where one of all is needed, or would be lost."""


class SidecarNotFoundError(SidecarError):
    """There is no sidecar for a checkpoint."""


class HubError(SidecarError):
    """A sidecar cannot be had from the hub, or not be put there."""


class ProcessError(FisherMaskError):
    """The processes of one run lost each other, or have not the same before them."""


class ToldError(FisherMaskError):
    """Another process of the run has told what failed."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error that says something, else the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The hub's client puts the bare status first and what it means below.
    telling = [line for line in lines if not re.match(r"\d{3} (Client|Server) Error\b", line)]
    return next(iter(telling or lines), type(error).__name__)
