"""Every error as `application/problem+json` (RFC 9457): what was wrong, where, and what to do."""

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException

from shared.errors import CaptuneError
from shared.schemas.common import Problem

log = logging.getLogger(__name__)


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(CaptuneError, _captune_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, database_unavailable)
    app.add_exception_handler(DataError, _not_storable)
    app.add_exception_handler(UnicodeEncodeError, _not_storable)
    app.add_exception_handler(Exception, _unexpected)


def problem(
    status: int, title: str, detail: str, code: str, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    body = Problem(title=title, status=status, detail=detail, code=code, **more)
    return JSONResponse(
        body.model_dump(exclude_none=True), status, headers=headers, media_type="application/problem+json"
    )


def from_error(error: CaptuneError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(error.status, error.title, error.message, error.code, headers, param=error.param)


async def _captune_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, CaptuneError)
    return from_error(error)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [{"param": ".".join(str(p) for p in e["loc"][1:]), "message": e["msg"]} for e in error.errors()]
    detail = "; ".join(f"{e['param'] or 'body'}: {e['message']}" for e in found[:5])
    return problem(422, "Invalid input", detail, "invalid_request", param=found[0]["param"] or None, errors=found)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {400: "unreadable_body", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    detail = {
        "unreadable_body": f"{error.detail}: it must arrive whole, as JSON in UTF-8 or as form data; send it again",
        "not_found": "there is nothing at this address; see /docs for what there is",
    }.get(code, error.detail)
    return problem(error.status_code, error.detail, detail, code, dict(error.headers or {}))


async def database_unavailable(_: Request, error: Exception) -> Response:
    log.error("database unreachable", exc_info=error)
    detail = "the database does not answer; nothing was changed, try again"
    return problem(503, "Service unavailable", detail, "database_unavailable", {"Retry-After": "2"})


async def _not_storable(_: Request, error: Exception) -> Response:
    log.info("a value that cannot be stored", extra={"error": type(error).__name__})
    detail = (
        "a value holds what no text or number here may: a NUL character, half a surrogate pair, or too large a number"
    )
    return problem(422, "Invalid input", detail, "value_not_storable")


async def _unexpected(_: Request, error: Exception) -> Response:
    return problem(500, "Internal error", "an unexpected error; the server's log has the details", "internal_error")
