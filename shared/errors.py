"""Errors that carry their HTTP status. Anything a user can cause is one of these; one handler turns them into RFC 9457
`application/problem+json` (shared/problems.py), and a worker keeps them as a job's `error {code, message, param}`."""


class CaptuneError(Exception):
    """Something a user or operator can mend. `message` says what was wrong, where, and what to do."""

    status = 500
    title = "Internal error"
    default_code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after  # seconds, sent as the Retry-After header


class InvalidInput(CaptuneError):
    status, title, default_code = 422, "Invalid input", "invalid_input"


class Unauthorized(CaptuneError):
    status, title, default_code = 401, "Unauthorized", "unauthorized"


class Forbidden(CaptuneError):
    status, title, default_code = 403, "Forbidden", "forbidden"


class NotFound(CaptuneError):
    status, title, default_code = 404, "Not found", "not_found"


class Conflict(CaptuneError):
    status, title, default_code = 409, "Conflict", "conflict"


class PreconditionFailed(CaptuneError):
    status, title, default_code = 412, "Precondition failed", "version_changed"


class PreconditionRequired(CaptuneError):
    status, title, default_code = 428, "Precondition required", "version_required"


class TooLarge(CaptuneError):
    status, title, default_code = 413, "Content too large", "too_large"


class TooBusy(CaptuneError):
    status, title, default_code = 429, "Too many requests", "too_busy"


class Unavailable(CaptuneError):
    status, title, default_code = 503, "Service unavailable", "unavailable"
