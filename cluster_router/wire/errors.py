"""Every error this project raises on purpose, in one small tree.

    ChameleonError
    ├── RequestError            the caller can fix it                        400
    │   ├── ContextLengthError  prompt and max_tokens exceed the context     400
    │   ├── UnknownModelError   the `model` field names nothing served       404
    │   ├── UnknownClusterError no such cluster in the current snapshot      404
    │   ├── AuthenticationError missing or wrong API key                     401
    │   ├── ForbiddenError      the API key does not reach so far            403
    │   └── TooLargeError       the body is longer than is taken             413
    ├── OverloadedError         queues are full, come back later             429
    ├── UnavailableError        a part is starting, restarting or gone       503
    ├── DeadlineError           the answer took longer than it may           504
    ├── EngineError             a request failed inside the engine           500
    └── SetupError              the operator can fix it, raised at start-up
        ├── ConfigError         a setting is unknown or contradicts another
        ├── ModelError          the base model cannot be fetched or read
        ├── BundleError         a bundle is damaged or belongs to another base
        └── DeltaError          a generated update is malformed or not finite

`status` is the HTTP status; the HTTP layer is the only place that reads it.
"""

from __future__ import annotations

from typing import ClassVar


class ChameleonError(Exception):
    """Base of the tree.

    Args:
        message: one sentence that names what to change.
        param: the request field or setting at fault, where there is one.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class RequestError(ChameleonError, ValueError):
    """The request itself is at fault."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthError(RequestError):
    """Prompt plus requested output do not fit in the model's context."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The `model` field names nothing that is served here."""

    status = 404
    code = "model_not_found"


class UnknownClusterError(RequestError):
    """The named cluster is not in the current snapshot."""

    status = 404
    code = "cluster_not_found"


class AuthenticationError(RequestError):
    """No API key, or one that is not accepted."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The API key is good, but not for this."""

    status = 403
    code = "forbidden"


class TooLargeError(RequestError):
    """The body is longer than the service takes."""

    status = 413
    code = "request_too_large"


class OverloadedError(ChameleonError):
    """The service is full. `retry_after` is a hint in seconds."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, str | None, float]]:
        return type(self), (self.message, self.param, self.retry_after)


class UnavailableError(ChameleonError):
    """A part of the service is starting, restarting or gone."""

    status = 503
    kind = "service_unavailable_error"
    code = "unavailable"


class DeadlineError(ChameleonError):
    """The answer was not complete within the request's time."""

    status = 504
    kind = "timeout_error"
    code = "deadline_exceeded"


class EngineError(ChameleonError):
    """A request failed inside the engine."""

    code = "engine_error"


class SetupError(ChameleonError):
    """Something the operator has to change; raised at start-up, never by a request."""


class ConfigError(SetupError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ModelError(SetupError):
    """The base model cannot be fetched, read or served."""


class BundleError(SetupError):
    """A bundle is damaged, incomplete, or belongs to another base model."""


class DeltaError(SetupError):
    """A generated update has the wrong shape or type, or is not finite. It is never applied."""
