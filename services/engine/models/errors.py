"""What can go wrong between a model's name and an engine that runs it."""

from __future__ import annotations

from pathlib import Path

from services.runtime.errors import TandemError


class ModelNotFoundError(TandemError):
    """No such model here; the message says what would bring it."""

    reason = "MODEL_NOT_FOUND"
    code = "NOT_FOUND"


class ModelFileError(TandemError):
    """A file of a model is damaged, or holds what Tandem can't serve."""

    reason = "MODEL_FILE"
    code = "FAILED_PRECONDITION"

    def __init__(self, file: Path | str, problem: str) -> None:
        super().__init__(f"{file}: {problem}", file=file, problem=problem)


class ModelFetchError(TandemError):
    """A model could not be brought here."""

    reason = "MODEL_FETCH"
    code = "UNAVAILABLE"


class ModelSpaceError(TandemError):
    """The disk is too full for the model."""

    reason = "MODEL_SPACE"
    code = "RESOURCE_EXHAUSTED"


class UnsupportedModelError(TandemError):
    """The model's folder asks for something that the embedded engine does not compute."""

    reason = "UNSUPPORTED_MODEL"
    code = "FAILED_PRECONDITION"


class UnsupportedAdapterError(TandemError):
    """A LoRA adapter is damaged, or is not one for this model and engine."""

    reason = "UNSUPPORTED_ADAPTER"
    code = "FAILED_PRECONDITION"


class NotInvariantError(TandemError):
    """Batch invariance was asked for and can't be had on this machine."""

    reason = "NOT_BATCH_INVARIANT"
    code = "FAILED_PRECONDITION"
