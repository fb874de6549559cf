"""One way to make an API: routers, error handlers, limits and health, the same for every service and for all of them
in one process."""

import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import health
from shared.auth import admit_upload
from shared.core import Core
from shared.errors import CaptuneError, TooLarge
from shared.ids import new_id
from shared.schemas.common import Problem

log = logging.getLogger(__name__)

# The routes whose bodies are streamed to disk; every other body is held in memory.
UPLOAD_PATHS = frozenset({"/v1/datasets", "/v1/caption_jobs/import", "/v1/classifiers/import"})
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


async def get_core(request: Request) -> Core:  # async: what does not wait needs no thread
    core: Core = request.app.state.core
    return core


CoreDep = Annotated[Core, Depends(get_core)]
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=200, description="a retry with the same key and body gets the first request's resource"),
]
After = Annotated[str | None, Query(description="the last id of the page before", max_length=100)]
Limit = Annotated[int, Query(ge=1, le=1000)]


def settled(app: FastAPI) -> FastAPI:
    """The same, in a process that from now on serves it and nothing else. What exists by now stays, so the garbage
    collector need not walk it: a full collection held up every request under way for 0.1 s (150,000 objects), and now
    for none."""
    gc.collect()
    gc.freeze()
    return app


def create_api(
    title: str, core: Core, routers: Sequence[APIRouter], lifespans: Sequence[Lifespan] = (), version: str = "0.1.0"
) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in lifespans:
                await stack.enter_async_context(each(app))
            yield
        core.close()

    app = FastAPI(
        title=title,
        version=version,
        lifespan=lifespan,
        responses={
            status: {"model": Problem, "content": {"application/problem+json": {}}} for status in (401, 403, 422)
        },
    )
    app.state.core = core
    app.state.readiness = {"database": core.db.check, "queue": core.queue.ping, "storage": core.store.check}
    for router in (health.router, *routers):
        app.include_router(router)
    app.add_exception_handler(CaptuneError, _captune_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(DataError, _not_storable)
    app.add_exception_handler(UnicodeEncodeError, _not_storable)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(BodyLimit, json_bytes=core.settings.max_json_bytes, upload_bytes=core.settings.max_upload_bytes)
    app.add_middleware(RequestLog)  # the outermost, so that a refused body is logged and counted too
    return app


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


async def _database_error(_: Request, error: Exception) -> Response:
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


def accepted(response: Response, location: str, retry_after: int = 1) -> None:
    """202: where to look, and when."""
    response.headers["Location"] = location
    response.headers["Retry-After"] = str(retry_after)


class BodyLimit:
    """Counts a request's bytes as they arrive, whatever Content-Length says; takes uploads from key holders only."""

    def __init__(self, app: ASGIApp, json_bytes: int, upload_bytes: int) -> None:
        self.app, self.json_bytes, self.upload_bytes = app, json_bytes, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        limit = self.upload_bytes if scope["path"] in UPLOAD_PATHS else self.json_bytes
        if scope["path"] in UPLOAD_PATHS and scope["method"] == "POST":
            try:  # here already: the framework spools a form to disk before it runs a route's own checks
                await run_in_threadpool(admit_upload, Request(scope))
            except CaptuneError as refused:
                return await from_error(refused)(scope, receive, send)
            except OperationalError as down:
                return await (await _database_error(Request(scope), down))(scope, receive, send)
        error = TooLarge(f"the request's body is over the limit of {limit} bytes", code="body_too_large")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            return await from_error(error)(scope, receive, send)
        seen, started = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise error
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal started
            if seen <= limit or started:  # FastAPI answers 400 to whatever is raised while it reads a body
                started = True
                await send(message)

        await self.app(scope, counted, unless_refused)
        if seen > limit and not started:
            await from_error(error)(scope, receive, send)


def _template(scope: Scope) -> str:
    """`/v1/datasets/{id}`. The route itself knows only its own router's part of it; FastAPI keeps the whole apart."""
    whole = scope.get("fastapi", {}).get("effective_route_context")
    return str(getattr(whole or scope.get("route"), "path", "unmatched"))


class RequestLog:
    """A request id on every answer, one log line and one metric per request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id, began, status = new_id("req"), time.perf_counter(), 500

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        finally:
            seconds = time.perf_counter() - began
            route = _template(scope)
            health.REQUESTS.labels(scope["method"], route, str(status)).observe(seconds)
            if route not in health.QUIET:
                fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
                log.info("request", extra={**fields, "status": status, "ms": round(1000 * seconds, 1)})
