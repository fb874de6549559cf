"""Every error as `application/problem+json` (RFC 9457): what was wrong, where, and what to do."""

import logging
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticSerializationError
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException

from shared.datasets.report import printable
from shared.errors import CaptuneError, from_disk
from shared.schemas.common import Problem
from shared.web.request_log import template

log = logging.getLogger(__name__)

# Errors that are listed, and characters of a message: an answer that repeats a flood is one.
_MOST, _LONGEST = 100, 4_000


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(CaptuneError, _captune_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, database_unavailable)
    app.add_exception_handler(DataError, _not_storable)
    app.add_exception_handler(UnicodeEncodeError, _not_storable)
    app.add_exception_handler(PydanticSerializationError, _not_json)
    app.add_exception_handler(OSError, _disk_error)


def problem(
    status: int, title: str, detail: str, code: str, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    body = Problem(title=title, status=status, detail=shortened(detail), code=code, **more)
    return JSONResponse(
        body.model_dump(exclude_none=True), status, headers=headers, media_type="application/problem+json"
    )


def shortened(message: str) -> str:
    return message if len(message) <= _LONGEST else message[: _LONGEST - 1] + "…"


def from_error(error: CaptuneError) -> Response:
    return problem(error.status, error.title, error.message, error.code, headers_of(error), param=error.param)


def headers_of(error: CaptuneError) -> dict[str, str]:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


async def _captune_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, CaptuneError)
    return from_error(error)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [
        {"param": printable(".".join(str(p) for p in e["loc"][1:])), "message": shortened(e["msg"])}
        for e in islice(error.errors(), _MOST)
    ]
    detail = "; ".join(f"{e['param'] or 'body'}: {e['message']}" for e in found[:5])
    return problem(422, "Invalid input", detail, "invalid_request", param=found[0]["param"] or None, errors=found)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, OSError) and (failing := from_disk(error.__cause__)):
        return from_error(failing)  # FastAPI says 400 where it cannot put a form's files on disk
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = _allowed(request) or headers.get("Allow", "")
    code = {400: "unreadable_body", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    where = "; see /docs for what there is" if request.app.openapi_url else ""
    detail = {
        "unreadable_body": f"{error.detail}: it must arrive whole, as JSON in UTF-8 or as form data; send it again",
        "not_found": f"there is nothing at this address{where}",
    }.get(code, error.detail)
    return problem(error.status_code, error.detail, detail, code, headers)


def _allowed(request: Request) -> str:
    """The methods of every route at this address; Starlette names those of one alone."""
    paths, path = request.app.openapi()["paths"], request.url.path
    methods = paths.get(path) or paths.get(template(request.scope), {})  # "import" is no id
    return ", ".join(method.upper() for method in methods)


async def database_unavailable(_: Request, error: Exception) -> Response:
    log.error("database unreachable", exc_info=error)
    detail = "the database does not answer; nothing was changed, try again"
    return problem(503, "Service unavailable", detail, "database_unavailable", {"Retry-After": "2"})


async def _disk_error(_: Request, error: Exception) -> Response:
    """A full or failing disk, wherever it showed: the store says so itself, temporary files do not."""
    assert isinstance(error, OSError)
    known = from_disk(error)
    if known is None:
        raise error
    log.error("a disk is full or fails", exc_info=error)
    return from_error(known)


async def _not_storable(_: Request, error: Exception) -> Response:
    log.info("a value that cannot be stored", extra={"error": type(error).__name__})
    detail = (
        "a value holds what no text or number here may: a NUL character, half a surrogate pair, or too large a number"
    )
    return problem(422, "Invalid input", detail, "value_not_storable")


async def _not_json(request: Request, error: Exception) -> Response:
    """Of the errors of this type only one is the caller's: half a surrogate pair, which JSON's escapes can write."""
    if "UnicodeEncodeError" in str(error):
        return await _not_storable(request, error)
    raise error


def unexpected() -> Response:
    """What Answers sends where nothing else has caught the error."""
    return problem(500, "Internal error", "an unexpected error; the server's log has the details", "internal_error")
