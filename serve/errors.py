"""Errors that a client of the server gets, with their HTTP status."""

from collections.abc import Mapping
from typing import ClassVar

from latentforge.runtime.errors import LatentforgeError

__all__ = [
    "BadRequestError",
    "BusyError",
    "ConflictError",
    "DeadlineError",
    "DrainingError",
    "ExpiredJobError",
    "ForbiddenError",
    "GenerationError",
    "JobCancelledError",
    "KeyRequiredError",
    "ModelUnavailableError",
    "PayloadError",
    "QueueFullError",
    "QuotaError",
    "ReusedKeyError",
    "ServeError",
    "UnknownJobError",
    "UnknownModelError",
    "WorkerLostError",
    "job_error",
]


class ServeError(LatentforgeError):
    """Error that a client gets.

    Attributes:
        status: HTTP status.
        kind: ``type`` in OpenAI's envelope.
        code: ``code`` in the envelope; a failed job has it too.
        param: name of the field that is wrong, if one is.
        retry_after: seconds after which to try again, if that helps.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: object = "", *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after


class BadRequestError(ServeError):
    """Request with a wrong value."""

    status, kind, code = 400, "invalid_request_error", "invalid_value"


class KeyRequiredError(ServeError):
    """Request without a valid API key."""

    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class ForbiddenError(ServeError):
    """Request for what this key, or this server, does not allow."""

    status, kind, code = 403, "invalid_request_error", "forbidden"


class UnknownModelError(ServeError):
    """Request for a model that this server does not have."""

    status, kind, code = 404, "invalid_request_error", "model_not_found"


class UnknownJobError(ServeError):
    """Request for a job that was never accepted, or is another key's."""

    status, kind, code = 404, "invalid_request_error", "job_not_found"


class ConflictError(ServeError):
    """Request that contradicts the state of its job."""

    status, kind, code = 409, "invalid_request_error", "conflict"


class ExpiredJobError(ServeError):
    """Request for a job whose result is no longer kept."""

    status, kind, code = 410, "invalid_request_error", "job_expired"


class PayloadError(ServeError):
    """Request whose body, or a picture in it, is too large."""

    status, kind, code = 413, "invalid_request_error", "payload_too_large"


class ReusedKeyError(ServeError):
    """Idempotency key that came with another request before."""

    status, kind, code = 422, "invalid_request_error", "idempotency_key_reused"


class QuotaError(ServeError):
    """Request beyond the limits of its API key."""

    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class JobCancelledError(ServeError):
    """Job that was cancelled while another request waited for it.

    OpenAI's clients send a request again after 408, 409, 429 and 5xx, which would undo the cancel.
    """

    status, kind, code = 410, "invalid_request_error", "cancelled"


class GenerationError(ServeError):
    """Request that the engines failed on."""

    status, kind, code = 500, "server_error", "generation_failed"


class WorkerLostError(ServeError):
    """Request whose process died twice."""

    status, kind, code = 500, "server_error", "worker_lost"


class ModelUnavailableError(ServeError):
    """Request for a model whose process does not start."""

    status, kind, code = 503, "server_error", "model_unavailable"


class QueueFullError(ServeError):
    """Request that the queue has no place for."""

    status, kind, code = 503, "server_error", "queue_full"


class DrainingError(ServeError):
    """Request to a server that shuts down."""

    status, kind, code = 503, "server_error", "draining"


class BusyError(ServeError):
    """Request that there is no room for beside those of others: memory, or a connection."""

    status, kind, code = 503, "server_error", "busy"


class DeadlineError(ServeError):
    """Request that was not done at its deadline."""

    status, kind, code = 504, "server_error", "deadline_exceeded"


_OF_JOBS: Mapping[str, type[ServeError]] = {
    error.code: error
    for error in (
        BadRequestError,
        DeadlineError,
        DrainingError,
        GenerationError,
        JobCancelledError,
        ModelUnavailableError,
        WorkerLostError,
    )
}


def job_error(code: str, message: str) -> ServeError:
    """Return the error of a job that failed or was cancelled, by its code."""
    return _OF_JOBS.get(code, GenerationError)(message)
