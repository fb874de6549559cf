"""A request id on every answer, one log line and one metric per request."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import health
from shared.ids import new_id

log = logging.getLogger(__name__)


def _template(scope: Scope) -> str:
    """`/v1/datasets/{id}`. The route itself knows only its own router's part of it; FastAPI keeps the whole apart."""
    whole = scope.get("fastapi", {}).get("effective_route_context")
    return str(getattr(whole or scope.get("route"), "path", "unmatched"))


class RequestLog:
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
