"""What the captioner's process tells of its models while they load, serve, or cannot be loaded."""

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from services.captioner.app import lifespan
from shared.config import CoreSettings
from shared.web import health

ENGINES = {"attributes": {}, "hosted": {"type": "openai", "model": "some-vlm"}}  # without base_urls it cannot be loaded


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    app.state.readiness = {}
    app.state.core = SimpleNamespace(settings=CoreSettings(database_url="", redis_url="", storage_url=""))
    app.include_router(health.router)
    return app


def settled(client: TestClient) -> Any:
    deadline = time.monotonic() + 60
    while "is loading" in (answer := client.get("/readyz")).text:
        assert answer.status_code == 503
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


def test_ready_with_the_measured_rate(app: FastAPI) -> None:
    with TestClient(app) as client:
        answer = settled(client)
    assert (answer.status_code, answer.json()["checks"]) == (200, {"model": "ok"})
    detail = answer.json()["details"]["model"]["attributes"]
    assert (detail["state"], detail["waiting"], detail["restarts"]) == ("ready", 0, 0)
    assert detail["revision"].startswith("attributes-")
    assert detail["rate"]["captions_per_second"] > 0
    assert detail["rate"]["completion_tokens_per_second"] > 0


def test_a_model_that_cannot_be_loaded_is_named_with_the_reason(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTUNE_ENGINES", json.dumps(ENGINES))
    with TestClient(app) as client:
        answer = settled(client)
    body = answer.json()
    assert answer.status_code == 503
    assert body["checks"]["model"].startswith("failed: hosted: Engine 'hosted' has no base_urls.")
    assert body["details"]["model"]["hosted"]["state"] == "failed"
    assert body["details"]["model"]["attributes"]["state"] in ("ready", "loading")
