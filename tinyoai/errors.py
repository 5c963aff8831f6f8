"""All exceptions of this project, with the HTTP status, type and code that a client gets.

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

wire.Failed carries them from a worker to the server by class name.
"""

from typing import ClassVar

import msgspec


class TinyoaiError(Exception):
    """Base class of everything that this project raises on purpose."""


class UsageError(TinyoaiError):
    """The command line cannot be carried out: exit code 2 (a bad flag) or 1 (anything else)."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ErrorDetail(msgspec.Struct, kw_only=True):
    """The error: what is wrong and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """OpenAI's error body, with every status from 400 up."""

    error: ErrorDetail


class ApiError(TinyoaiError):
    """An error response: HTTP status, and OpenAI's type, code and param."""

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
        """Returns the JSON error body. A lone surrogate in the message becomes a question mark."""
        message = self.message.encode("utf-8", "replace").decode()
        detail = ErrorDetail(message=message, type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorBody(detail))


class BadRequest(ApiError):
    """The request is invalid; sending it again does not help."""

    status = 400
    type = "invalid_request_error"


class InvalidJson(BadRequest):
    """The body is not valid JSON."""

    default_code = "invalid_json"


class ContextLengthExceeded(BadRequest):
    """The prompt does not fit into the model's context window."""

    default_code = "context_length_exceeded"


class Unauthorized(ApiError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"
    default_headers: ClassVar[dict[str, str]] = {"www-authenticate": "Bearer"}


class Forbidden(ApiError):
    """The Host or Origin of the request is not allowed."""

    status = 403
    type = "permission_error"


class NotFound(ApiError):
    """Nothing exists at this path."""

    status = 404
    type = "not_found_error"


class ModelNotFound(NotFound):
    """No model has this name."""

    default_code = "model_not_found"


class MethodNotAllowed(ApiError):
    """The path does not take this method; the Allow header lists those that it takes."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(ApiError):
    """The client sent too slowly, or the request waited too long in the queue."""

    status = 408
    type = "timeout_error"
    default_code = "request_timeout"


class PayloadTooLarge(ApiError):
    """The body is over the size limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class UriTooLong(ApiError):
    """The request target is over the size limit."""

    status = 414
    type = "invalid_request_error"
    default_code = "uri_too_long"


class UnsupportedMediaType(ApiError):
    """The body's media type or content coding is not supported."""

    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class ExpectationFailed(ApiError):
    """The Expect header asks for something other than 100-continue."""

    status = 417
    type = "invalid_request_error"
    default_code = "expectation_failed"


class RateLimited(ApiError):
    """This client sends too many requests."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Overloaded(RateLimited):
    """The model's queue is full."""

    default_code = "queue_full"


class HeadersTooLarge(ApiError):
    """The request's head is over the size limit."""

    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class InternalError(ApiError):
    """The server failed; its log has the details under the request id."""

    status = 500
    type = "internal_error"
    default_code = "internal_error"


class ModelError(InternalError):
    """The model computed numbers that are not finite; sending the request again does not help."""

    default_code = "model_error"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class WorkerDied(InternalError):
    """The model's process ended while it worked on the request.

    The request may be what ended it, so the server does not run it again and tells the SDKs not to retry.
    """

    default_code = "worker_died"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class NotImplementedCoding(ApiError):
    """The transfer coding is not supported."""

    status = 501
    type = "invalid_request_error"
    default_code = "not_implemented"


class Unavailable(ApiError):
    """The server cannot answer now; a later request may succeed."""

    status = 503
    type = "service_unavailable"
    default_code = "service_unavailable"


class ModelLoading(Unavailable):
    """The model is still loading."""

    type = "unavailable_error"
    default_code = "model_loading"
    default_headers: ClassVar[dict[str, str]] = {"retry-after": "1"}


class ModelFailed(Unavailable):
    """The model's process keeps failing."""

    default_code = "model_failed"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class InsufficientMemory(Unavailable):
    """The model does not fit into memory, even with every other model unloaded."""

    default_code = "insufficient_memory"
    default_headers: ClassVar[dict[str, str]] = {"x-should-retry": "false"}


class MemoryShortage(InsufficientMemory):
    """The model does not fit into the memory that is free now; other programs may free some soon."""

    default_headers: ClassVar[dict[str, str]] = {"retry-after": "10"}


class VersionNotSupported(ApiError):
    """The request's version is not HTTP/1.0 or HTTP/1.1."""

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
    """Returns the exception of this class name, or an InternalError for an unknown name."""
    headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
    return _BY_NAME.get(kind, InternalError)(message, param=param, code=code, headers=headers)
