"""What holds for every answer, whatever made it: headers that keep browsers from doing anything with it, and a problem
where a handler raised what nobody foresaw."""

import logging

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.web.problems import unexpected

log = logging.getLogger(__name__)

# Set where the route did not say otherwise. Nothing here is a page, so nothing may be loaded, run or framed by one.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# The documentation pages: scripts and styles of this server, and the few lines that FastAPI writes into them.
_DOCS = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "worker-src blob:; img-src 'self' data:; frame-ancestors 'none'"
)
_DOCS_PATHS = ("/docs", "/redoc")


class Answers:
    """Inside the request log, which gives the 500 its id, and around everything else. Starlette's own last handler
    stands outside every middleware: what it answers would carry neither id nor headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False
        extra = HEADERS | ({"Content-Security-Policy": _DOCS} if scope["path"] in _DOCS_PATHS else {})

        async def safe(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in extra.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, safe)
        except Exception:
            if started:
                raise  # the server cuts the connection: half an answer must not look whole
            log.exception("unexpected error", extra={"method": scope["method"], "path": scope["path"]})
            await unexpected()(scope, receive, safe)
