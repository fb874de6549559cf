"""Clients that hold connections open: heads and bodies that trickle, connections with no request, readers that do not
read; and bytes that two servers could take for different requests. Through real sockets, against the server that
`python -m shared.web.serve` starts, with its patience cut to fractions of a second."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from shared.core import Core
from shared.web.api import create_api
from shared.web.auth import create_key
from shared.web.body_limit import PROGRESS_BYTES, BodyLimit
from shared.web.serve import BoundedProtocol
from tests.integration.conftest import ROUTERS
from tests.integration.factories import archive
from tests.integration.support import wait_for

PATIENCE = 0.6  # seconds, of everything
SOON = PATIENCE + 3.0  # by when it must be over, on a busy machine


class Impatient(BoundedProtocol):
    header_seconds = unread_seconds = PATIENCE


router = APIRouter()


@router.post("/v1/answers_at_once")
async def answers_at_once() -> Response:
    return Response("read none of it")


@router.get("/v1/endless")
async def endless(request: Request) -> Response:
    """Until nobody takes it."""
    running: list[bool] = request.app.state.running

    async def parts() -> Any:
        running.append(True)
        try:
            while True:
                yield b"x" * 65_536
                await asyncio.sleep(0)
        finally:
            running.pop()

    return StreamingResponse(parts())


class Server:
    def __init__(self, port: int, key: str, app: Any) -> None:
        self.port, self.key, self.app = port, key, app

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as found:
            yield found

    def head(self, line: str, *headers: str) -> bytes:
        lines = [f"{line} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.key}", *headers, "", ""]
        return "\r\n".join(lines).encode()

    def ask(self, data: bytes) -> bytes:
        """All that comes until the server closes, or has sent nothing more for a while."""
        with self.connection() as wire:
            with suppress(ConnectionError):
                wire.sendall(data)
            return received(wire, 1.0)


def received(wire: socket.socket, seconds: float) -> bytes:
    wire.settimeout(seconds)
    found = b""
    with suppress(TimeoutError, ConnectionError):
        while piece := wire.recv(65_536):
            found += piece
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def seconds_until_closed(wire: socket.socket, drip: bytes = b"", every: float = 0.1) -> float:
    """How long the server lets this go on."""
    began = time.monotonic()
    wire.settimeout(every)
    while time.monotonic() - began < 15:
        try:
            if drip:
                wire.sendall(drip)
            if not wire.recv(65_536):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - began


@pytest.fixture(scope="module")
def server(_core: Core) -> Iterator[Server]:
    limits = {"max_json_bytes": 2**22, "max_upload_bytes": 2**24}
    core = Core(_core.settings.model_copy(update=limits), _core.db, _core.queue, _core.store)
    app = create_api("Captune", core, [*ROUTERS, router])
    app.state.running = []
    for each in app.user_middleware:
        if each.cls is BodyLimit:
            each.kwargs["progress_seconds"] = PATIENCE
    with _core.transaction() as session:
        _, key = create_key(session, owner="slow", name="test", scopes=("read", "write"))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=Impatient, log_config=None, lifespan="off", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_for(lambda: running.started)
    yield Server(running.servers[0].sockets[0].getsockname()[1], key, app)
    running.should_exit = running.force_exit = True
    thread.join(10)


# -- slow --------------------------------------------------------------------------------------------------------------


def test_a_connection_without_a_request_is_closed(server: Server) -> None:
    with server.connection() as wire:
        assert PATIENCE * 0.8 < seconds_until_closed(wire) < SOON


@pytest.mark.parametrize("drip", [b"X", b"X-A: b\r\n", b"\r\n"], ids=["letters", "headers", "empty lines"])
def test_a_head_that_trickles_is_cut_off(server: Server, drip: bytes) -> None:
    with server.connection() as wire:
        wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" if drip != b"\r\n" else b"")
        assert seconds_until_closed(wire, drip) < SOON


def test_a_second_head_that_trickles_is_cut_off_too(server: Server) -> None:
    with server.connection() as wire:
        wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(wire.recv(65_536)) == 200
        wire.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert seconds_until_closed(wire, b"X") < SOON


@pytest.mark.parametrize("path", ["/v1/evaluations", "/v1/datasets", "/v1/caption_jobs/import"])
@pytest.mark.parametrize("sized", [True, False], ids=["content-length", "chunked"])
def test_a_body_that_trickles_is_408(server: Server, path: str, sized: bool) -> None:
    kind = "application/json" if path.endswith("ns") else "multipart/form-data; boundary=b"
    length = "Content-Length: 60000" if sized else "Transfer-Encoding: chunked"
    with server.connection() as wire:
        first = b"" if path.endswith("ns") else b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
        first = first if sized or not first else b"%x\r\n%b\r\n" % (len(first), first)
        wire.sendall(server.head(f"POST {path}", f"Content-Type: {kind}", length) + first)
        began, answer = time.monotonic(), b""
        wire.settimeout(0.1)
        while not answer and time.monotonic() - began < 15:
            with suppress(TimeoutError):
                wire.sendall(b" " if sized else b"1\r\n \r\n")
                answer = wire.recv(65_536)
        assert time.monotonic() - began < SOON
        assert status(answer) == 408, answer
        assert b"application/problem+json" in answer
        assert b"body_too_slow" in answer + received(wire, 1.0)
        assert seconds_until_closed(wire) < SOON, "and the connection with it"


def test_a_body_that_stops_is_408(server: Server) -> None:
    with server.connection() as wire:
        wire.sendall(
            server.head("POST /v1/evaluations", "Content-Type: application/json", "Content-Length: 100") + b"{"
        )
        answer = received(wire, SOON)
        assert status(answer) == 408


def test_a_slow_but_honest_upload_passes(server: Server) -> None:
    """It takes several times the patience, and keeps the pace."""
    data = archive() + b"\0" * 5 * PROGRESS_BYTES  # behind a zip: it is taken at this point, whatever becomes of it
    parts = [b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n' % name for name in (b"name", b"domain")]
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.zip"\r\n\r\n'
    body = b"".join(parts) + head + data + b"\r\n--b--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=b"
    with server.connection() as wire:
        wire.sendall(server.head("POST /v1/datasets", kind, f"Content-Length: {len(body)}", "Connection: close"))
        began = time.monotonic()
        for start in range(0, len(body), PROGRESS_BYTES // 2):
            wire.sendall(body[start : start + PROGRESS_BYTES // 2])
            time.sleep(PATIENCE / 3)
        assert time.monotonic() - began > 2 * PATIENCE
        assert status(received(wire, 3.0)) == 202


def test_a_body_that_nobody_reads_is_not_awaited_for_ever(server: Server) -> None:
    """The answer is sent at once; what trickles in behind it keeps the connection only for a while."""
    with server.connection() as wire:
        wire.sendall(server.head("POST /v1/answers_at_once", "Content-Length: 1000000"))
        assert status(wire.recv(65_536)) == 200
        assert seconds_until_closed(wire, b"x") < SOON


def test_a_reader_that_does_not_read_is_given_up(server: Server) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("the kernel has no such timer")
    with server.connection() as wire:
        wire.sendall(server.head("GET /v1/endless"))
        wait_for(lambda: server.app.state.running, 5)
        wait_for(lambda: not server.app.state.running, 30)


def test_many_idle_connections_do_not_keep_others_out(server: Server) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    for wire in idle[::2]:
        wire.sendall(b"GET / HTTP/1.1\r\nX: ")
    assert status(server.ask(server.head("GET /v1/datasets", "Connection: close"))) == 200
    time.sleep(PATIENCE)
    assert all(seconds_until_closed(wire) < SOON for wire in idle)
    for wire in idle:
        wire.close()


# -- floods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: " + b"a" * 10_000_000,
        b"X-A: b\r\n" * 1_000_000,
        b"a" * 10_000_000 + b": b",
        b"Cookie: " + b"a=b; " * 1_000_000,
    ],
    ids=["one long header", "a million headers", "a long name", "cookies"],
)
def test_head_floods_are_cut_off(server: Server, head: bytes) -> None:
    answer = server.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + head)
    assert status(answer) in (0, 400, 431)
    assert status(server.ask(server.head("GET /v1/datasets", "Connection: close"))) == 200


@pytest.mark.parametrize(
    "target", [b"/" + b"a" * 1_000_000, b"/v1/datasets?" + b"limit=1&" * 200_000], ids=["path", "query"]
)
def test_long_addresses_are_refused(server: Server, target: bytes) -> None:
    assert status(server.ask(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")) in (0, 400, 414, 431)


# -- smuggling ---------------------------------------------------------------------------------------------------------

HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
AMBIGUOUS = {
    "two lengths": ("Content-Length: 5", "Content-Length: 6"),
    "lengths in one": ("Content-Length: 5, 6",),
    "length with a sign": ("Content-Length: +5",),
    "negative length": ("Content-Length: -1",),
    "hexadecimal length": ("Content-Length: 0x5",),
    "length with a space inside": ("Content-Length: 1 5",),
    "length of 40 digits": ("Content-Length: " + "9" * 40,),
    "unknown coding": ("Transfer-Encoding: xchunked",),
    "two codings": ("Transfer-Encoding: gzip, chunked",),
    "chunked twice": ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    "space before the colon": ("Transfer-Encoding : chunked",),
    "NUL": ("X: y\0z",),
    "no name": (": x",),
    "name with a space": ("X Y: z",),
}


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_heads_that_can_be_read_in_two_ways_are_refused(server: Server, headers: tuple[str, ...]) -> None:
    answer = server.ask(server.head("POST /v1/answers_at_once", *headers) + b"0\r\n\r\n" + HIDDEN)
    assert status(answer) in (0, 400, 408, 413, 501) or b"HTTP/1.1" not in answer[10:]
    assert b"/v1/hidden" not in answer
    assert answer.count(b"HTTP/1.1 404") == 0, "what was hidden in the body was taken for a request"


def test_a_length_and_chunks_are_refused_and_nothing_behind_them_is_read(server: Server) -> None:
    """RFC 9112, 6.1: an intermediary may have believed the length. The connection must not go on."""
    both = ("Content-Length: 6", "Transfer-Encoding: chunked", "Content-Type: application/json")
    for order in (both, both[::-1]):
        answer = server.ask(server.head("POST /v1/evaluations", *order) + b"0\r\n\r\n" + HIDDEN)
        assert answer.count(b"HTTP/1.1") == 1
        assert status(answer) == 400


CHUNKS = {
    "no number": b"xyz\r\nabc\r\n0\r\n\r\n",
    "negative": b"-1\r\nabc\r\n0\r\n\r\n",
    "too large for 64 bits": b"fffffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "longer than it says": b"3\r\nabcdef\r\n0\r\n\r\n",
    "an endless size": b"0" * 100_000 + b"3\r\nabc\r\n0\r\n\r\n",
    "an endless extension": b"3;" + b"x" * 1_000_000 + b"\r\nabc\r\n0\r\n\r\n",
    "a flood of trailers": b"0\r\n" + b"X: y\r\n" * 300_000 + b"\r\n",
    "a new line alone": b"3\nabc\n0\n\n",
}


@pytest.mark.parametrize("body", CHUNKS.values(), ids=CHUNKS)
def test_chunks_that_lie(server: Server, body: bytes) -> None:
    head = server.head("POST /v1/evaluations", "Transfer-Encoding: chunked", "Content-Type: application/json")
    answer = server.ask(head + body + HIDDEN)
    assert status(answer) in (0, 400, 408, 413, 422)
    assert answer.count(b"HTTP/1.1 404") == 0
    assert status(server.ask(server.head("GET /v1/datasets", "Connection: close"))) == 200


def test_a_length_longer_than_the_body_and_then_silence(server: Server) -> None:
    with server.connection() as wire:
        wire.sendall(
            server.head("POST /v1/datasets", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 900")
        )
        wire.shutdown(socket.SHUT_WR)
        assert seconds_until_closed(wire) < SOON


def test_other_protocols_are_not_spoken(server: Server) -> None:
    websocket = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==",
    )
    assert status(server.ask(server.head("GET /v1/datasets", *websocket))) == 200, "answered as plain HTTP"
    assert b"101 " not in server.ask(server.head("GET /healthz", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
    for hello in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"SSH-2.0-x\r\n",
        b"GET /healthz\r\n\r\n",
    ):
        assert status(server.ask(hello)) in (0, 400, 404, 505)
    connect = server.ask(server.head("CONNECT example.com:443"))
    assert status(connect) in (400, 401, 404, 405)
    assert status(server.ask(server.head("TRACE /v1/datasets"))) == 405
    proxied = server.ask(server.head("GET http://169.254.169.254/latest/meta-data/", "Connection: close"))
    assert status(proxied) in (400, 404)


def test_a_connection_cut_hard_leaves_nothing(server: Server) -> None:
    for _ in range(50):
        with server.connection() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
            wire.sendall(
                server.head(
                    "POST /v1/datasets", "Content-Type: multipart/form-data; boundary=b", "Content-Length: 9000"
                )
            )
    assert status(server.ask(server.head("GET /v1/datasets", "Connection: close"))) == 200
