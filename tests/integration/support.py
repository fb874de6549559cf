"""What the fixtures of conftest.py hand out, and waiting."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.testclient import TestClient

DEAD_REDIS = "unix:///nonexistent/valkey.sock"
JSON_LIMIT, UPLOAD_LIMIT = 20_000, 200_000  # bytes; small, so that a test need not send much


@dataclass(frozen=True)
class Servers:
    database_url: str
    redis_url: str


@dataclass(frozen=True)
class Api:
    """Clients that differ in the key they send."""

    anna: TestClient  # read and write
    ben: TestClient  # read and write, another owner
    admin: TestClient
    reader: TestClient  # anna's, read only
    nobody: TestClient  # sends no key


def client(app: FastAPI, secret: str | None) -> TestClient:
    """A client that sends `secret` as its API key; errors of the server are answers, not exceptions."""
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    return TestClient(app, headers=headers, raise_server_exceptions=False)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
