"""The errors a user can meet. Each message says what happened, where, and what to do about it."""


class FisherMaskError(Exception):
    """Base class of all errors raised on bad input."""


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


class SidecarNotFoundError(SidecarError):
    """There is no sidecar for a checkpoint."""
