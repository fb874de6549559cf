"""What every route of every service shares: errors, keys, limits, health."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

from services.evaluator import app as evaluator
from services.trainer import app as trainer
from shared.core import Core
from shared.web.api import create_api
from shared.web.auth import create_key
from shared.web.health import NotReady
from tests.integration.conftest import ROUTERS
from tests.integration.factories import add_dataset, archive, read_job
from tests.integration.support import JSON_LIMIT, UPLOAD_LIMIT, Api, client


def assert_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, "about:blank")
    assert body["title"]
    assert body["detail"]
    return body


def test_no_key_and_a_wrong_key(api: Api, app: FastAPI) -> None:
    answer = api.nobody.get("/v1/datasets")
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert_problem(client(app, "ck_wrong").get("/v1/datasets"), 401, "unauthorized")
    assert_problem(api.nobody.get("/v1/datasets", headers={"Authorization": "Basic eDp5"}), 401, "unauthorized")


def test_an_unknown_address_and_an_unknown_method(api: Api) -> None:
    assert_problem(api.anna.get("/v1/nothing"), 404, "not_found")
    answer = api.anna.put("/v1/datasets")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"]


def test_what_is_missing_is_404_with_the_parameter(api: Api) -> None:
    body = assert_problem(api.anna.get("/v1/fine_tuning/jobs/ft_nothing"), 404, "not_found")
    assert "ft_nothing" in body["detail"]
    assert body["param"] == "id"


def test_invalid_bodies_name_every_field(api: Api) -> None:
    answer = api.anna.post("/v1/fine_tuning/jobs", json={"dataset_id": "ds_1", "shots": 0, "lerning_rate": 1})
    body = assert_problem(answer, 422, "invalid_request")
    assert {error["param"] for error in body["errors"]} == {"shots", "lerning_rate"}
    body = assert_problem(api.anna.post("/v1/evaluations", json={"split": "dev"}), 422, "invalid_request")
    assert body["param"] == "split"
    body = assert_problem(api.anna.post("/v1/evaluations", json={}), 422, "invalid_request")
    assert "give either classifier_id or model" in body["detail"]
    answer = api.anna.post(
        "/v1/evaluations", content=b'{"classifier_id": ', headers={"Content-Type": "application/json"}
    )
    assert_problem(answer, 422, "invalid_request")
    assert_problem(api.anna.get("/v1/datasets", params={"limit": 0}), 422, "invalid_request")


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            yield method.upper(), path


def test_every_route_wants_a_key(api: Api, app: FastAPI) -> None:
    found = [route for route in routes(app) if route[1].startswith("/v1/")]
    assert len(found) > 30
    for method, path in found:
        answer = api.nobody.request(method, path.replace("{id}", "x"))
        assert answer.status_code == 401, f"{method} {path}"


def test_a_read_key_can_change_nothing(api: Api, app: FastAPI) -> None:
    for method, path in routes(app):
        if method == "GET" or not path.startswith("/v1/") or path.endswith("/predict"):  # which changes nothing
            continue
        answer = api.reader.request(method, path.replace("{id}", "x"))
        assert_problem(answer, 403, "missing_scope")
    assert api.reader.get("/v1/datasets").status_code == 200


def test_keys_are_made_used_and_revoked_by_an_admin(api: Api, app: FastAPI, core: Core) -> None:
    assert_problem(api.anna.post("/v1/keys", json={"owner": "anna"}), 403, "missing_scope")
    assert_problem(api.anna.get("/v1/keys"), 403, "missing_scope")
    answer = api.admin.post("/v1/keys", json={"owner": "carl", "name": "laptop", "scopes": ["read"]})
    assert answer.status_code == 201
    made = answer.json()
    carl = client(app, made["key"])
    assert carl.get("/v1/datasets").status_code == 200
    assert_problem(carl.post("/v1/evaluations", json={"classifier_id": "x"}), 403, "missing_scope")

    listed = api.admin.get("/v1/keys").json()["data"]
    assert {key["owner"] for key in listed} == {"anna", "ben", "root", "carl"}
    assert made["key"] not in api.admin.get("/v1/keys").text, "a key is shown once"
    with core.db.engine.connect() as connection:
        stored = connection.exec_driver_sql("SELECT string_agg(api_keys::text, ' ') FROM api_keys").scalar_one()
    assert made["key"] not in stored
    assert made["key"].removeprefix("ck_") not in stored

    assert_problem(api.anna.delete(f"/v1/keys/{made['id']}"), 403, "missing_scope")
    assert api.admin.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert_problem(carl.get("/v1/datasets"), 401, "unauthorized")
    assert_problem(api.admin.delete("/v1/keys/key_nothing"), 404, "not_found")
    assert_problem(api.admin.post("/v1/keys", json={"owner": "a b"}), 422, "invalid_request")


def test_the_workers_token_is_a_key_of_its_own(api: Api, app: FastAPI) -> None:
    service = client(app, "the service token")
    assert service.get("/v1/datasets").status_code == 200
    assert_problem(service.get("/v1/keys"), 403, "missing_scope")


def test_a_body_over_the_limit(api: Api, base_url: str) -> None:
    too_long = b'{"classifier_id": "' + b"x" * JSON_LIMIT + b'"}'
    headers = dict(api.anna.headers) | {"Content-Type": "application/json"}
    assert_problem(api.anna.post("/v1/evaluations", content=too_long, headers=headers), 413, "body_too_large")

    def in_pieces() -> Iterator[bytes]:  # no Content-Length
        for start in range(0, len(too_long), 1000):
            yield too_long[start : start + 1000]

    url = base_url + "/v1/evaluations"
    headers = {"Authorization": headers["authorization"], "Content-Type": "application/json"}
    assert_problem(httpx.post(url, content=in_pieces(), headers=headers), 413, "body_too_large")
    assert api.anna.post("/v1/evaluations", json={"classifier_id": "x"}).status_code == 404, "a small one passes"


def test_an_upload_over_the_limit(api: Api, base_url: str) -> None:
    form = {"name": "pets", "domain": "pets"}
    files = {"file": ("pets.zip", archive() + b"\0" * UPLOAD_LIMIT)}
    assert_problem(api.anna.post("/v1/datasets", data=form, files=files), 413, "body_too_large")

    request = httpx.Request("POST", base_url + "/v1/datasets", data=form, files=files)
    body = request.read()
    headers = {
        "Authorization": api.anna.headers["authorization"],
        "Content-Type": request.headers["Content-Type"],
    }
    pieces = (body[start : start + 4096] for start in range(0, len(body), 4096))
    answer = httpx.post(base_url + "/v1/datasets", content=pieces, headers=headers)
    assert_problem(answer, 413, "body_too_large")
    assert api.anna.get("/v1/datasets").json()["data"] == []


def test_an_upload_without_a_key_is_not_read(api: Api, base_url: str) -> None:
    """A form is spooled to disk before a route's checks run, so anybody could fill the disk."""
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    keys = {401: {}, 403: {"Authorization": api.reader.headers["authorization"]}}
    for status, key in keys.items():
        answer = send_part_of_an_upload(base_url, boundary | key)
        assert answer.startswith(f"HTTP/1.1 {status} "), answer
        assert "application/problem+json" in answer


def send_part_of_an_upload(base_url: str, headers: dict[str, str]) -> str:
    """The answer to a request whose body never ends."""
    url = httpx.URL(base_url)
    with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
        lines = [
            f"{name}: {value}" for name, value in ({"Host": url.host, "Content-Length": "100000"} | headers).items()
        ]
        connection.sendall("\r\n".join(["POST /v1/datasets HTTP/1.1", *lines, "", "--b\r\n"]).encode())
        return connection.recv(65536).decode()


def test_every_answer_carries_a_request_id(api: Api) -> None:
    answers = [
        api.anna.get("/v1/datasets"),
        api.nobody.get("/v1/datasets"),
        api.anna.get("/nothing"),
        api.anna.post("/v1/evaluations", content=b"x" * (JSON_LIMIT + 1)),
        api.nobody.get("/healthz"),
    ]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("req_") for id in ids)


def test_an_unexpected_error_tells_nothing_of_the_inside(core: Core) -> None:
    router = APIRouter()

    @router.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("the password is 1234")

    answer = client(create_api("broken", core, [router]), None).get("/v1/broken")
    assert_problem(answer, 500, "internal_error")
    assert "1234" not in answer.text


def test_health(api: Api) -> None:
    assert api.nobody.get("/healthz").json() == {"status": "ok"}
    answer = api.nobody.get("/readyz")
    assert answer.status_code == 200
    checks = dict.fromkeys(("database", "queue", "storage"), "ok")
    assert answer.json() == {"status": "ready", "checks": checks, "details": {}}


def test_what_a_check_tells_is_shown_whether_it_passes_or_not(core: Core) -> None:
    app = create_api("checked", core, [])
    nobody = client(app, None)
    app.state.readiness["model"] = lambda: {"rate": 2.5}
    answer = nobody.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["model"]) == (200, "ok")
    assert answer.json()["details"] == {"model": {"rate": 2.5}}

    def loading() -> None:
        raise NotReady("it is loading", {"restarts": 1})

    def broken() -> None:
        raise RuntimeError("the password is 1234")

    app.state.readiness |= {"model": loading, "other": broken}
    answer = nobody.get("/readyz")
    body = answer.json()
    assert (answer.status_code, body["status"]) == (503, "not ready")
    assert (body["checks"]["model"], body["checks"]["other"]) == ("failed: it is loading", "failed: RuntimeError")
    assert body["details"] == {"model": {"restarts": 1}}
    assert "1234" not in answer.text


def test_not_ready_without_valkey(core_without_redis: Core) -> None:
    deaf = client(create_api("deaf", core_without_redis, ROUTERS), None)
    answer = deaf.get("/readyz")
    assert answer.status_code == 503
    checks = answer.json()["checks"]
    assert checks.pop("queue").startswith("failed")
    assert checks == {"database": "ok", "storage": "ok"}
    assert deaf.get("/healthz").status_code == 200, "it need not be restarted"
    assert deaf.get("/metrics").status_code == 200, "the metrics tell of the outage"


def test_a_job_is_accepted_without_valkey(core: Core, core_without_redis: Core) -> None:
    with core.transaction() as session:
        _, secret = create_key(session, owner="anna", name="", scopes=("write",))
    deaf = client(create_api("deaf", core_without_redis, ROUTERS), secret)
    answer = deaf.post("/v1/caption_jobs", json={"dataset_id": add_dataset(core)})
    assert answer.status_code == 202
    assert read_job(core, answer.json()["id"]).status == "queued"


def test_a_database_that_does_not_answer_is_503(core: Core) -> None:
    url = type(core.settings.database_url)("postgresql://nobody@/nothing?host=/nonexistent")
    lost = Core.from_settings(core.settings.model_copy(update={"database_url": url}))
    without = client(create_api("lost", lost, ROUTERS), "ck_any")
    answer = without.get("/v1/datasets")
    assert_problem(answer, 503, "database_unavailable")
    assert answer.headers["Retry-After"]
    upload = without.post("/v1/datasets", data={"name": "pets"}, files={"file": ("pets.zip", archive())})
    assert_problem(upload, 503, "database_unavailable")
    ready = without.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["database"].startswith("failed")
    lost.close()


def test_metrics(api: Api, core: Core) -> None:
    for _ in range(3):
        assert api.anna.get("/v1/evaluations/eval_nothing").status_code == 404
    core.queue.enqueue("evaluate", "eval_1")
    text = api.nobody.get("/metrics").text
    assert 'captune_queue_depth{kind="evaluate"} 1.0' in text
    counted = [line for line in text.splitlines() if line.startswith("captune_request_seconds_count")]
    assert any('route="/v1/evaluations/{id}"' in line and 'status="404"' in line for line in counted), counted
    assert "eval_nothing" not in text, "an id in a label makes a series per request"


@pytest.mark.parametrize("create_app", [trainer.create_app, evaluator.create_app])
def test_each_service_is_an_app_of_its_own(
    create_app: Callable[[], FastAPI], core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{create_app.__module__}.configure", lambda level: None)  # leave the test run's logging alone
    monkeypatch.setenv("DATABASE_URL", core.settings.database_url.get_secret_value())
    monkeypatch.setenv("REDIS_URL", core.settings.redis_url.get_secret_value())
    monkeypatch.setenv("STORAGE_URL", core.settings.storage_url)
    with TestClient(create_app()) as alone:
        assert alone.get("/readyz").status_code == 200
        assert alone.get("/v1/datasets").status_code == 404, "another service's route"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/datasets/%00", None),
        ("GET", "/v1/datasets?after=%00", None),
        ("POST", "/v1/keys", {"owner": "a", "name": "nul \0"}),
        ("GET", "/v1/leaderboard?dataset_id=ds_x&shots=99999999999", None),
        ("POST", "/v1/fine_tuning/jobs", {"dataset_id": "ds_x", "shots": 3_000_000_000}),
    ],
)
def test_what_the_database_cannot_hold_is_refused(api: Api, method: str, path: str, body: object) -> None:
    answer = api.admin.request(method, path, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
