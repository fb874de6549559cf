"""How much a request may send, counted as it arrives."""

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import OperationalError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.auth import admit_upload
from shared.errors import CaptuneError, TooLarge
from shared.problems import database_unavailable, from_error

# The routes whose bodies are streamed to disk; every other body is held in memory.
UPLOAD_PATHS = frozenset({"/v1/datasets", "/v1/caption_jobs/import", "/v1/classifiers/import"})


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
                return await (await database_unavailable(Request(scope), down))(scope, receive, send)
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
