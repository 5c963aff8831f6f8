"""The exception tree of everything that can be refused or fail, as a client sees it.

    TinyoaiError
    ├── UsageError             a flag, a file or a port: one line on stderr and an exit code
    └── ApiError               status, type and code on the class; message and param on the instance
        ├── BadRequest 400  ── InvalidJson, ContextLengthExceeded
        ├── Unauthorized 401, Forbidden 403, NotFound 404 ── ModelNotFound, MethodNotAllowed 405
        ├── RequestTimeout 408, PayloadTooLarge 413, UriTooLong 414, UnsupportedMediaType 415
        ├── ExpectationFailed 417, RateLimited 429 ── Overloaded, HeadersTooLarge 431
        ├── InternalError 500 ── ModelError, WorkerDied
        └── NotImplementedCoding 501, Unavailable 503 ── ModelLoading, ModelFailed, InsufficientMemory,
            VersionNotSupported 505

Only web/ makes a status line of them; only wire.Failed carries them across processes, by class name.
"""

from typing import ClassVar

import msgspec


class TinyoaiError(Exception):
    """Anything this project raises on purpose."""


class UsageError(TinyoaiError):
    """The command cannot be carried out as given: exit code 2 (a flag) or 1 (anything else)."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ErrorDetail(msgspec.Struct, kw_only=True):
    """The inside of OpenAI's error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """OpenAI's error body."""

    error: ErrorDetail


class ApiError(TinyoaiError):
    """A refusal or failure with its HTTP status and OpenAI's type, code and param."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str | None] = None
    default_headers: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.headers = {**self.default_headers, **(headers or {})}

    def body(self) -> bytes:
        """The JSON error body; a lone surrogate in the message becomes a question mark."""
        message = self.message.encode("utf-8", "replace").decode()
        detail = ErrorDetail(message=message, type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(detail))


class BadRequest(ApiError):
    """The request itself is wrong; the same request will be wrong again."""

    status = 400
    type = "invalid_request_error"


class InvalidJson(BadRequest):
    """The body is not JSON."""

    default_code = "invalid_json"


class ContextLengthExceeded(BadRequest):
    """The prompt does not fit into the model's context window."""

    default_code = "context_length_exceeded"


class Unauthorized(ApiError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"
    default_headers: ClassVar[dict[str, str]] = {"www-authenticate": "Bearer"}


class Forbidden(ApiError):
    """Who asks may not ask from there: a foreign Host or Origin."""

    status = 403
    type = "permission_error"


class NotFound(ApiError):
    """No such route."""

    status = 404
    type = "not_found_error"


class ModelNotFound(NotFound):
    """No such model."""

    default_code = "model_not_found"


class MethodNotAllowed(ApiError):
    """The route exists, with other methods: they stand in the Allow header."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The client was too slow, or the request waited too long."""

    status = 408
    type = "timeout_error"
    default_code = "request_timeout"


class PayloadTooLarge(ApiError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class UriTooLong(ApiError):
    """The request target is over the limit."""

    status = 414
    type = "invalid_request_error"
    default_code = "uri_too_long"


class UnsupportedMediaType(ApiError):
    """The body is of a kind, or in a coding, that is not read here."""

    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class ExpectationFailed(ApiError):
    """An Expect header other than 100-continue."""

    status = 417
    type = "invalid_request_error"
    default_code = "expectation_failed"


class RateLimited(ApiError):
    """Too many requests from this client."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Overloaded(RateLimited):
    """The queue before the model is full."""

    default_code = "queue_full"


class HeadersTooLarge(ApiError):
    """The request's head is over the limit."""

    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class InternalError(ApiError):
    """A fault of this server: logged with the request id, never told in detail."""

    status = 500
    type = "internal_error"
    default_code = "internal_error"


class ModelError(InternalError):
    """The model itself answers nonsense (numbers that are not finite): asking again does not help."""

    default_code = "model_error"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class WorkerDied(InternalError):
    """The model's process ended under a running request, which is never run again by itself.

    The request may be what killed it, so the SDKs are told not to send it again either.
    """

    default_code = "worker_died"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class NotImplementedCoding(ApiError):
    """A transfer coding that is not spoken here."""

    status = 501
    type = "invalid_request_error"
    default_code = "not_implemented"


class Unavailable(ApiError):
    """Not now; later perhaps."""

    status = 503
    type = "service_unavailable"
    default_code = "service_unavailable"


class ModelLoading(Unavailable):
    """The model is on its way."""

    type = "unavailable_error"
    default_code = "model_loading"
    default_headers: ClassVar[dict[str, str]] = {"retry-after": "1"}


class ModelFailed(Unavailable):
    """The model's process cannot be kept up."""

    default_code = "model_failed"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class InsufficientMemory(Unavailable):
    """The model does not fit into memory, whatever else is unloaded: asking again does not help."""

    default_code = "insufficient_memory"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class MemoryShortage(InsufficientMemory):
    """The model does not fit into the memory that is free now; other programs may free some soon."""

    default_headers: ClassVar[dict[str, str]] = {"retry-after": "10"}


class VersionNotSupported(ApiError):
    """Not HTTP/1.0 or HTTP/1.1."""

    status = 505
    type = "invalid_request_error"
    default_code = "http_version_not_supported"


def _tree(root: type[ApiError]) -> dict[str, type[ApiError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_NAME = _tree(ApiError)


def by_name(
    kind: str, message: str, *, param: str | None, code: str | None, retry_after: float | None = None
) -> ApiError:
    """The exception that a wire.Failed stands for; an unknown kind is an InternalError."""
    headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
    return _BY_NAME.get(kind, InternalError)(message, param=param, code=code, headers=headers)
