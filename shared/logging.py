"""Structured logs: one JSON object a line on stderr. Called by `main`s, never at import.

Every line carries what it was written for: the request (`fields`), or the job that a worker process does, which does
one at a time (`job_fields`); and, where traces are on, the trace."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from opentelemetry import trace

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}

_of_request: ContextVar[Mapping[str, object] | None] = ContextVar("log_fields", default=None)
_of_job: dict[str, object] = {}


@contextmanager
def fields(**named: object) -> Iterator[None]:
    """Meanwhile, on every line of this thread or coroutine, and of the threads that Starlette runs for it."""
    token = _of_request.set({**(_of_request.get() or {}), **named})
    try:
        yield
    finally:
        _of_request.reset(token)


@contextmanager
def job_fields(**named: object) -> Iterator[None]:
    """Meanwhile, on every line of this process, whichever of its threads writes it."""
    _of_job.update(named)
    try:
        yield
    finally:
        _of_job.clear()


def field(name: str) -> object:
    """What a line written here would carry under this name, or None."""
    return (_of_request.get() or _of_job).get(name)


class JsonFormatter(logging.Formatter):
    """Fields given through `extra=` become top-level keys."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(_of_job)
        entry.update(_of_request.get() or {})
        if (span := trace.get_current_span().get_span_context()).is_valid:
            entry |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        entry.update({k: v for k, v in record.__dict__.items() if k not in _STANDARD})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str = "INFO") -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic", "rq.worker"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
