"""Serves an API: `python -m shared.web.serve services.captioner.app:create_app --port 8000`.

uvicorn, with bounds on what a client may hold open. Left alone it waits for ever for a connection's first request, for
the rest of a header, for the rest of a body that was answered already, and for a reader that does not read. A body that
trickles while a route reads it is body_limit.py's matter."""

import argparse
import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 1_000  # beyond them requests are answered 503: under the 1,024 files a process may usually open
HEADER_SECONDS = 20.0
UNREAD_SECONDS = 60.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 by h11, which holds a head to 16 KiB and refuses what two readers could take for different requests."""

    header_seconds, unread_seconds = HEADER_SECONDS, UNREAD_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family != socket.AF_UNIX:
            # The kernel gives up on a peer that takes nothing for so long, be it gone or unwilling.
            milliseconds = int(1000 * self.unread_seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """From the first byte that belongs to no request under way until there is one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an API.")
    parser.add_argument("app", help="module:function that makes the application")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--grace", type=int, default=20, help="seconds that open requests get on SIGTERM")
    options = parser.parse_args()
    uvicorn.run(
        options.app,
        factory=True,
        host=options.host,
        port=options.port,
        http=BoundedProtocol,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=options.grace,
        access_log=False,  # the request log has it
        server_header=False,
    )


if __name__ == "__main__":
    main()
