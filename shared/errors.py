"""Errors that carry their HTTP status. Anything a user can cause is one of these; one handler turns them into RFC 9457
`application/problem+json` (shared/web/problems.py), and a worker keeps them as a job's `error {code, message, param}`.
"""

import errno


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


class Malformed(CaptuneError):
    status, title, default_code = 400, "Bad request", "malformed"


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


class TooSlow(CaptuneError):
    status, title, default_code = 408, "Request timeout", "too_slow"


class TooLarge(CaptuneError):
    status, title, default_code = 413, "Content too large", "too_large"


class TooBusy(CaptuneError):
    status, title, default_code = 429, "Too many requests", "too_busy"


class Unavailable(CaptuneError):
    status, title, default_code = 503, "Service unavailable", "unavailable"


class StorageFull(Unavailable):
    status, title, default_code = 507, "Insufficient storage", "storage_full"


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FAILING = frozenset({errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENXIO, errno.ENODEV})


def cause(error: Exception) -> str:
    """What a library's error says, as far as an answer may repeat it: a text with a slash may name a path or a host of
    the server's, and is left to the log of whoever asks."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text}" if text and "/" not in text else type(error).__name__


def from_disk(error: OSError) -> Unavailable | None:
    """What an operator has to mend, in words, where a disk is full or fails; None for any other error. Names no path: a
    user of the API is told this."""
    if error.errno in _FULL:
        return StorageFull(
            "the server's disk is full, so nothing was stored; whoever runs it has to make room ('captune collect' "
            "removes what nothing needs), then try again",
            retry_after=60,
        )
    if error.errno in _FAILING:
        return Unavailable(
            f"the server's storage cannot be written or read ({error.strerror}), so nothing was stored; whoever runs "
            "it has to mend that, then try again",
            code="storage_failed",
            retry_after=60,
        )
    return None
