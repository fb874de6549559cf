"""A request id on every answer, one log line and one metric per request."""

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import tracing
from shared.ids import new_id
from shared.logging import fields
from shared.metrics import REQUESTS
from shared.web import health

log = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # an id that a caller may choose itself


def template(scope: Scope) -> str:
    """`/v1/datasets/{id}`. The route itself knows only its own router's part of it; FastAPI keeps the whole apart."""
    whole = scope.get("fastapi", {}).get("effective_route_context")
    return str(getattr(whole or scope.get("route"), "path", "unmatched"))


class RequestLog:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get(tracing.REQUEST_ID, "")
        request_id = given if _PLAIN.fullmatch(given) else new_id("req")
        method = scope["method"] if scope["method"] in _METHODS else "other"  # a caller's word makes no time series
        began, status = time.perf_counter(), 500

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[tracing.REQUEST_ID] = request_id
            await send(message)

        with fields(request_id=request_id):
            try:
                await self.app(scope, receive, tagged)
            finally:
                seconds = time.perf_counter() - began
                route = template(scope)
                REQUESTS.labels(method, route, str(status)).observe(seconds)
                if route not in health.QUIET:
                    told = {"method": scope["method"], "path": scope["path"], "status": status}
                    log.info("request", extra={**told, "ms": round(1000 * seconds, 1)})
