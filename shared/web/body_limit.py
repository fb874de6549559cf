"""What a request's body may be: how large, whose, and how slow. Told while it arrives, whatever Content-Length says."""

import asyncio
import re

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import OperationalError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.errors import CaptuneError, Malformed, TooBusy, TooLarge, TooSlow, Unavailable
from shared.web.auth import admit_body, admit_upload
from shared.web.problems import database_unavailable, from_error

# The routes whose bodies are streamed to disk; every other body is held in memory.
UPLOAD_PATHS = frozenset({"/v1/datasets", "/v1/caption_jobs/import", "/v1/classifiers/import"})
# The routes whose bodies hold pictures. Every other is JSON that somebody wrote: display names of 20,000 classes have
# 1 MB. JSON of 64 MiB could be parsed into 2 GB, and no other request would be answered meanwhile.
PICTURE_PATHS = re.compile(r"/v1/chat/completions|/v1/classifiers/[^/]+/predict")
WRITTEN_BYTES = 4 * 2**20
STRANGERS_BYTES = 64 * 2**10  # read from anybody; more from key holders only, as routes check keys after the body
HELD_BODIES = 32  # of full length, in memory at once
# Slow: 16 KiB take longer than 30 s. (Under 5 kbit/s; the time that this process takes with it does not count.)
PROGRESS_BYTES, PROGRESS_SECONDS = 16 * 2**10, 30.0


class BodyLimit:
    """Counts a request's bytes as they arrive; takes long bodies from key holders only; ends those that trickle."""

    def __init__(
        self, app: ASGIApp, json_bytes: int, upload_bytes: int, progress_seconds: float = PROGRESS_SECONDS
    ) -> None:
        self.app, self.json_bytes, self.upload_bytes = app, json_bytes, upload_bytes
        self.progress_seconds = progress_seconds
        self.held = 0  # bytes in memory, of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(self, scope, receive)
        started = False

        async def unless_refused(message: Message) -> None:
            nonlocal started
            if body.refusal is None or started:  # FastAPI answers 400 to whatever is raised while it reads a body
                started = True
                await send(message)

        try:
            if await body.admitted():
                try:
                    await self.app(scope, body.receive, unless_refused)
                except CaptuneError:
                    if body.refusal is None or started:
                        raise
            if body.refusal is not None and not started:
                await body.refusal(scope, receive, send)
        finally:
            self.held -= body.held

    def limit(self, path: str) -> int:
        if path in UPLOAD_PATHS:
            return self.upload_bytes
        return self.json_bytes if PICTURE_PATHS.fullmatch(path) else min(self.json_bytes, WRITTEN_BYTES)


class _Body:
    """One request's. `refusal` is the answer to what could not be let in."""

    def __init__(self, of: BodyLimit, scope: Scope, receive: Receive) -> None:
        self._of, self._scope, self._receive = of, scope, receive
        self._limit, self._upload = of.limit(scope["path"]), scope["path"] in UPLOAD_PATHS
        self._seen = self._since_progress = self.held = 0
        self._patience = of.progress_seconds
        self._known = self._ended = False
        self.refusal: Response | None = None

    async def admitted(self) -> bool:
        """What its head already tells: an upload needs a key that may write, before the framework spools it to disk."""
        headers = dict(self._scope["headers"])
        declared = headers.get(b"content-length", b"0")
        length = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        try:
            if b"content-length" in headers and b"transfer-encoding" in headers:
                # A proxy may have read one and we the other, and what is left be taken for a request (RFC 9112, 6.1).
                message = "the request has both Content-Length and Transfer-Encoding; send one of them"
                raise self._refused(Malformed(message, code="ambiguous_length"), close=True)
            if length > STRANGERS_BYTES or (self._upload and self._scope["method"] == "POST"):
                await self._check_key()
            self._check_length(length)
        except CaptuneError:
            return False
        return True

    async def receive(self) -> Message:
        if self._ended:  # all that can come is that the client hung up
            return await self._receive()
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(self._patience):
                message = await self._receive()
        except TimeoutError:
            raise self._refused(
                TooSlow(
                    f"the request's body came slower than {PROGRESS_BYTES} bytes in {self._of.progress_seconds:g} s; "
                    "send it again over a faster connection",
                    code="body_too_slow",
                ),
                close=True,  # the rest would trickle on
            ) from None
        size = len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        self._seen += size
        self._patience -= clock() - began
        self._since_progress += size
        if self._since_progress >= PROGRESS_BYTES:
            self._since_progress, self._patience = 0, self._of.progress_seconds
        self._check_length(self._seen)
        if self._seen > STRANGERS_BYTES:
            await self._check_key()
        if not self._upload:
            self._hold(size)
        return message

    def _check_length(self, length: int) -> None:
        if length > self._limit:
            message = f"the request's body is over the limit of {self._limit} bytes"
            raise self._refused(TooLarge(message, code="body_too_large"))

    async def _check_key(self) -> None:
        if self._known:
            return
        self._known = True
        request = Request(self._scope)
        try:
            await run_in_threadpool(admit_upload if self._upload else admit_body, request)
        except CaptuneError as error:
            raise self._refused(error) from None
        except OperationalError as down:
            refused = self._refused(Unavailable("the database does not answer"))
            self.refusal = await database_unavailable(request, down)
            raise refused from None

    def _hold(self, size: int) -> None:
        self.held += size
        self._of.held += size
        if self._of.held > HELD_BODIES * self._of.json_bytes:
            message = "too many long requests are being read; send this one again later"
            raise self._refused(TooBusy(message, code="too_many_bodies", retry_after=1))

    def _refused(self, error: CaptuneError, *, close: bool = False) -> CaptuneError:
        self._ended = True
        self.refusal = from_error(error)
        if close:
            self.refusal.headers["Connection"] = "close"
        return error
