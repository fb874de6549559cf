"""A captioner behind a real socket, as the caption worker sees it; a test decides every answer."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

import pytest


@dataclass(frozen=True)
class Asked:
    """A chat request."""

    number: int  # counted from 1
    prompt: str
    picture: str  # data URI
    body: dict[str, Any]

    @property
    def characteristic(self) -> str:
        return str(self.body["metadata"]["characteristic"])

    @property
    def class_name(self) -> str:
        return str(self.body["metadata"]["class_name"])

    @property
    def words(self) -> int:
        return int(self.body["metadata"]["words"])


@dataclass(frozen=True)
class Answer:
    """`text` of a caption; or a failure with `status`, or a body of one's own."""

    text: str = "a soft coat"
    status: int = 200
    code: str = "why"
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"


def _plain(asked: Asked) -> Answer:
    return Answer(f"a {asked.characteristic} of a {asked.class_name} number {crc32(asked.picture.encode())}")


class CaptionerServer:
    """`answer` is called for every chat request, on a thread of its own; it may wait."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answer: Callable[[Asked], Answer] = _plain
        self.revision = "r1"
        self.loading = 0  # how many times more `/v1/models` says that the model is not ready
        self.error: str | None = None  # what it says of why
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def calls(self) -> int:
        return len(self.asked)

    def serve_worker(self, environment: pytest.MonkeyPatch) -> None:
        """Caption jobs of this process ask here, eight requests at a time."""
        environment.setenv("CAPTUNE_CAPTIONER_URL", self.url)
        environment.setenv("CAPTUNE_SERVICE_TOKEN", "token")
        environment.setenv("CAPTUNE_CAPTION_CONCURRENCY", "8")

    def models(self) -> dict[str, Any]:
        self.loading -= 1
        about = {"engine": "hf", "revision": self.revision, "precision": "nf4", "ready": self.loading < 0}
        about |= {"error": self.error}
        return {"data": [{"id": "m", "captune": about}]}

    def chat(self, body: dict[str, Any]) -> Answer:
        picture, prompt = body["messages"][0]["content"]
        with self.lock:
            asked = Asked(len(self.asked) + 1, prompt["text"], picture["image_url"]["url"], body)
            self.asked.append(asked)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self.answer(asked)
        finally:
            with self.lock:
                self.in_flight -= 1

    def completion(self, answer: Answer) -> dict[str, Any]:
        choice = {"message": {"content": answer.text}, "finish_reason": answer.finish_reason}
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        return {"choices": [choice], "usage": usage, "system_fingerprint": self.revision}


@contextmanager
def captioner_server() -> Iterator[CaptionerServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply(200, json.dumps(running.models()).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = running.chat(body)
            if answer.body is not None:
                return self.reply(answer.status, answer.body, answer.headers)
            ok = {"error": {"message": "the server's own words", "code": answer.code}}
            what = running.completion(answer) if answer.status == 200 else ok
            self.reply(answer.status, json.dumps(what).encode(), answer.headers)

        def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client hung up: a cancelled job does
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    running = CaptionerServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield running
    server.shutdown()
    server.server_close()
    thread.join()
