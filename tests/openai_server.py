"""A model server that speaks OpenAI's chat completions over real sockets, and misbehaves on request.

Each chat request takes the next behaviour of `script`; when that is empty, `otherwise`. A behaviour is a function of
the handler and the request's body that answers, or does not.
"""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Behaviour = Callable[["Handler", dict[str, Any]], None]


def completion(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A faultless answer; `text`, `finish_reason`, `choices`, `model`, `usage`, `message` replace parts of it, and
    `usage=None` leaves it out."""
    message = changes.get("message", {"role": "assistant", "content": changes.get("text", "a red fox")})
    choice = {"index": 0, "message": message, "finish_reason": changes.get("finish_reason", "stop")}
    usage = changes.get("usage", {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14})
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": changes.get("model", body.get("model")),
        "choices": [choice] * changes.get("choices", 1),
    }
    return answer if usage is None else {**answer, "usage": usage}


def ok(**changes: Any) -> Behaviour:
    return lambda handler, body: handler.json(200, completion(body, **changes))


def echo(handler: "Handler", body: dict[str, Any]) -> None:
    """Answers with the prompt's words."""
    handler.json(200, completion(body, text=body["messages"][0]["content"][-1]["text"]))


def after(seconds: float, then: Behaviour | None = None) -> Behaviour:
    """Slow; or, with seconds enough, hanging. Ends early when the server stops."""

    def behave(handler: "Handler", body: dict[str, Any]) -> None:
        handler.owner.stopping.wait(seconds)
        (then or ok())(handler, body)

    return behave


def status(code: int, message: str = "no", **headers: str) -> Behaviour:
    error = {"error": {"message": message, "type": "some_error", "param": None, "code": None}}
    return lambda handler, body: handler.json(code, error, **headers)


def raw(data: bytes, content_type: str = "application/json", code: int = 200) -> Behaviour:
    return lambda handler, body: handler.send(code, data, content_type)


def html(handler: "Handler", body: dict[str, Any]) -> None:
    handler.send(200, b"<!doctype html><title>Sign in</title>", "text/html")


def cut(handler: "Handler", body: dict[str, Any]) -> None:
    """Promises a whole body, sends half of it, hangs up."""
    data = json.dumps(completion(body)).encode()
    handler.send(200, data[: len(data) // 2], "application/json", length=len(data))
    handler.hang_up()


def drop(handler: "Handler", body: dict[str, Any]) -> None:
    """Hangs up without a word."""
    handler.hang_up()


def trickle(handler: "Handler", body: dict[str, Any]) -> None:
    """A byte now and then, so that no single read waits for long."""
    data = json.dumps(completion(body)).encode()
    handler.send(200, b"", "application/json", length=len(data))
    for byte in data:
        if handler.owner.stopping.wait(0.05):
            return
        handler.wfile.write(bytes([byte]))


def wants_max_completion_tokens(handler: "Handler", body: dict[str, Any]) -> None:
    if "max_tokens" in body:
        words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        status(400, words)(handler, body)
    else:
        ok(text=f"limit {body['max_completion_tokens']}")(handler, body)


@dataclass(frozen=True)
class Seen:
    body: dict[str, Any]
    headers: dict[str, str]
    at: float  # time.monotonic()


class OpenAIServer:
    """`with OpenAIServer() as server: server.url`. `served` is what /models lists; `models` may replace that answer.
    `room`: with more requests in flight than this, the rest hear 429."""

    def __init__(
        self, *, served: tuple[str, ...] = ("tiny",), port: int = 0, otherwise: Behaviour | None = None
    ) -> None:
        self.served = served
        self.models: Behaviour | None = None
        self.script: deque[Behaviour] = deque()
        self.otherwise = otherwise or ok()
        self.room: int | None = None
        self.seen: list[Seen] = []
        self.looks = 0  # at /models
        self.in_flight = self.peak = self.refused = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Listener(("127.0.0.1", port), Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if killed: nothing listens any more, and open connections break."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._http.break_connections()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: OpenAIServer

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def break_connections(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as real servers do
    server: _Listener
    disable_nagle_algorithm = True

    @property
    def owner(self) -> OpenAIServer:
        return self.server.owner

    def do_GET(self) -> None:
        owner = self.owner
        owner.looks += 1
        if self.path != "/v1/models":
            self.json(404, {"detail": "Not Found"})
        elif owner.models is not None:
            owner.models(self, {})
        else:
            self.json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in owner.served]})

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self.json(404, {"detail": "Not Found"})
            return
        with owner.lock:
            owner.seen.append(Seen(body, dict(self.headers.items()), time.monotonic()))
            owner.in_flight += 1
            owner.peak = max(owner.peak, owner.in_flight)
            full = owner.room is not None and owner.in_flight > owner.room
            owner.refused += full
            behave = status(429, "too many") if full else owner.script.popleft() if owner.script else owner.otherwise
        try:
            behave(self, body)
        finally:
            with owner.lock:
                owner.in_flight -= 1

    def json(self, code: int, data: Any, **headers: str) -> None:
        self.send(code, json.dumps(data).encode(), "application/json", None, **headers)

    def send(self, code: int, data: bytes, content_type: str, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass
