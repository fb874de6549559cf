"""API keys: how they end, when they were used, who may be left without one; and what `captune up` remembers."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event, text, update

from captune import cli
from services.embedded.stack import stored_key
from shared.core import Core
from shared.db.models import ApiKey
from shared.errors import Conflict
from shared.web.api import create_api
from shared.web.auth import create_key, hash_key, revoke_key
from tests.integration.conftest import ROUTERS
from tests.integration.support import Api, client
from tests.integration.test_web import assert_problem


def make(api: Api, **request: Any) -> dict[str, Any]:
    answer = api.admin.post("/v1/keys", json={"owner": "carl", **request})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def change(core: Core, **columns: Any) -> None:
    """All keys."""
    with core.transaction() as session:
        session.execute(update(ApiKey).values(**columns))


def last_used(core: Core, key_id: str) -> datetime | None:
    with core.transaction() as session:
        return session.get_one(ApiKey, key_id).last_used_at


@contextmanager
def statements(core: Core, *about: str) -> Iterator[list[str]]:
    """Those that begin with one of `about`, as they are run."""
    ran: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(about):
            ran.append(statement)

    event.listen(core.db.engine, "before_cursor_execute", note)
    try:
        yield ran
    finally:
        event.remove(core.db.engine, "before_cursor_execute", note)


# -- their end ---------------------------------------------------------------------------------------------------------


def test_a_key_expires(api: Api, app: FastAPI, core: Core) -> None:
    made = make(api, expires_in_days=30)
    assert made["expires_at"] == pytest.approx(time.time() + 30 * 86400, abs=60)
    carl = client(app, made["key"])
    assert carl.get("/v1/datasets").status_code == 200
    with core.transaction() as session:
        session.get_one(ApiKey, made["id"]).expires_at = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    answer = carl.get("/v1/datasets")
    body = assert_problem(answer, 401, "key_expired")
    assert "expired on 2026-05-04 at 03:02 UTC" in body["detail"]
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    files = {"file": ("pets.zip", b"no zip")}
    assert_problem(carl.post("/v1/datasets", data={"name": "a"}, files=files), 401, "key_expired")


def test_an_end_that_makes_no_sense_is_refused(api: Api) -> None:
    def refused(code: str, **request: Any) -> dict[str, Any]:
        return assert_problem(api.admin.post("/v1/keys", json={"owner": "carl", **request}), 422, code)

    assert refused("invalid_input", expires_at=int(time.time()) - 5)["param"] == "expires_at"
    assert "not both" in refused("invalid_request", expires_at=2**33, expires_in_days=1)["detail"]
    for request in (
        {"expires_in_days": 0},
        {"expires_at": 2**60},
        {"rate_limit": "0/second"},
        {"rate_limit": "1/day "},
    ):
        refused("invalid_request", **request)
    assert make(api, expires_at=2**33)["expires_at"] == 2**33


def test_what_is_revoked_ends_at_once_and_once(api: Api, app: FastAPI, core: Core) -> None:
    made = make(api)
    carl = client(app, made["key"])
    assert carl.get("/v1/datasets").status_code == 200
    assert api.admin.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert_problem(carl.get("/v1/datasets"), 401, "unauthorized")
    (first,) = (key["revoked_at"] for key in api.admin.get("/v1/keys").json()["data"] if key["id"] == made["id"])
    with core.transaction() as session:
        session.get_one(ApiKey, made["id"]).revoked_at = datetime(2026, 1, 1, tzinfo=UTC)
    assert first is not None
    assert api.admin.delete(f"/v1/keys/{made['id']}").status_code == 204, "said twice"
    (again,) = (key["revoked_at"] for key in api.admin.get("/v1/keys").json()["data"] if key["id"] == made["id"])
    assert again == datetime(2026, 1, 1, tzinfo=UTC).timestamp(), "when it was revoked does not change"


# -- nobody is locked out ----------------------------------------------------------------------------------------------


def test_the_last_admin_key_is_not_revoked(api: Api, app: FastAPI, core: Core) -> None:
    (root,) = (key["id"] for key in api.admin.get("/v1/keys").json()["data"] if key["scopes"] == ["admin"])
    ended = make(api, scopes=["admin"], expires_in_days=1)
    with core.transaction() as session:
        session.get_one(ApiKey, ended["id"]).expires_at = datetime.now(UTC) - timedelta(days=1)
    body = assert_problem(api.admin.delete(f"/v1/keys/{root}"), 409, "last_admin_key")
    assert "make another first" in body["detail"]
    assert api.admin.get("/v1/keys").status_code == 200
    assert api.admin.delete(f"/v1/keys/{ended['id']}").status_code == 204, "one that has ended is no way in"
    second = make(api, scopes=["read", "admin"])
    assert api.admin.delete(f"/v1/keys/{root}").status_code == 204
    assert client(app, second["key"]).get("/v1/keys").status_code == 200


def test_two_admins_who_revoke_each_other_leave_one(core: Core) -> None:
    with core.transaction() as session:
        ids = [create_key(session, owner="root", name=str(i), scopes=("admin",))[0].id for i in range(2)]
    together = threading.Barrier(2)

    def revoke(id: str) -> bool:
        together.wait()
        try:
            with core.transaction() as session:
                revoke_key(session, id)
                time.sleep(0.2)  # before its commit
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(revoke, ids)) == [False, True]


# -- telling them apart ------------------------------------------------------------------------------------------------


def test_a_list_tells_keys_apart_and_never_the_key(api: Api) -> None:
    made = make(api, name="laptop", rate_limit="5/minute")
    shown = next(key for key in api.admin.get("/v1/keys").json()["data"] if key["id"] == made["id"])
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert made["key"].startswith(shown["prefix"])
    assert len(shown["prefix"]) == 8
    assert (shown["name"], shown["rate_limit"], shown["last_used_at"]) == ("laptop", "5/minute", None)
    assert hash_key(made["key"]) not in api.admin.get("/v1/keys").text


def test_a_repeated_request_makes_no_second_key(api: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    request = {"owner": "carl", "name": "laptop"}
    assert api.admin.post("/v1/keys", json=request, headers=headers).status_code == 201
    body = assert_problem(api.admin.post("/v1/keys", json=request, headers=headers), 409, "already_made")
    (made,) = (key for key in api.admin.get("/v1/keys").json()["data"] if key["owner"] == "carl")
    assert made["id"] in body["detail"]
    other = api.admin.post("/v1/keys", json={"owner": "dora"}, headers=headers)
    assert_problem(other, 422, "idempotency_key_reused")


# -- their use ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(core: Core) -> FastAPI:
    """An application that has written no key's use yet."""
    return create_api("fresh", core, ROUTERS)


def test_the_last_use_is_written_once_a_minute(api: Api, fresh: FastAPI, core: Core) -> None:
    made = make(api)
    assert last_used(core, made["id"]) is None
    carl = client(fresh, made["key"])
    with statements(core, "UPDATE api_keys") as wrote:
        for _ in range(20):
            assert carl.get("/v1/datasets").status_code == 200
        first = last_used(core, made["id"])
        assert first is not None
        assert abs(first - datetime.now(UTC)) < timedelta(minutes=1)
        other = client(create_api("another process", core, ROUTERS), made["key"])
        assert other.get("/v1/datasets").status_code == 200
    assert len(wrote) == 1
    change(core, last_used_at=datetime.now(UTC) - timedelta(minutes=2))
    assert other.get("/v1/datasets").status_code == 200
    assert last_used(core, made["id"]) > first  # type: ignore[operator]


def test_a_use_that_cannot_be_written_refuses_nobody(api: Api, fresh: FastAPI, core: Core) -> None:
    made = make(api)
    carl = client(fresh, made["key"])
    with core.transaction() as session:
        session.execute(text("ALTER TABLE api_keys ADD CONSTRAINT full_disk CHECK (last_used_at IS NULL) NOT VALID"))
    try:
        with statements(core, "UPDATE api_keys") as tried:
            for _ in range(5):
                assert carl.get("/v1/datasets").status_code == 200
        assert len(tried) == 1, "and it is not tried with every request"
    finally:
        with core.transaction() as session:
            session.execute(text("ALTER TABLE api_keys DROP CONSTRAINT full_disk"))


def test_nobody_waits_for_another_to_write_it(api: Api, fresh: FastAPI, core: Core) -> None:
    made = make(api)
    with ThreadPoolExecutor(1) as pool:
        with core.transaction() as session:
            session.get_one(ApiKey, made["id"], with_for_update=True)
            asked = pool.submit(client(fresh, made["key"]).get, "/v1/datasets")
            wait([asked], 10)
            assert asked.done()
        assert asked.result().status_code == 200


def test_a_request_is_one_query_more(api: Api, core: Core, app: FastAPI) -> None:
    """Of a key that was used within the minute: no transaction around it, and no second statement."""
    assert api.anna.get("/v1/fine_tuning/methods").status_code == 200
    with statements(core, "") as ran:
        assert api.anna.get("/v1/fine_tuning/methods").status_code == 200
    assert len(ran) == 1, ran


# -- what operators chose ----------------------------------------------------------------------------------------------


def test_what_captune_up_remembers_is_renewed_when_it_was_revoked(core: Core, app: FastAPI) -> None:
    said: list[str] = []
    first = stored_key(core.db, "ck_" + "remembered" * 4, said.append)
    assert stored_key(core.db, first, said.append) == first == "ck_" + "remembered" * 4
    assert said == []
    for ended in ({"revoked_at": datetime.now(UTC)}, {"revoked_at": None, "expires_at": datetime.now(UTC)}):
        change(core, **ended)
        assert client(app, first).get("/v1/keys").status_code == 401
        renewed = stored_key(core.db, first, said.append)
        assert renewed != first
        assert client(app, renewed).get("/v1/keys").status_code == 200
        assert "connection.json was revoked or has expired" in said.pop()


def test_the_command_line_makes_lists_and_revokes(
    api: Api, base_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTUNE_URL", base_url)
    monkeypatch.setenv("CAPTUNE_API_KEY", api.admin.headers["authorization"].removeprefix("Bearer "))

    def captune(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["keys", *arguments])
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
        return printed.err if code else printed.out

    options = ("--name", "laptop", "--scopes", "read", "--expires-in-days", "7", "--rate-limit", "50/minute")
    id, key, *_ = captune("create", "--owner", "carl", *options).split()
    httpx.get(f"{base_url}/v1/datasets", headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    (shown,) = (line for line in captune("list").splitlines() if line.startswith(id))
    assert key not in shown
    for part in ("carl", "laptop", key[:8], "read", "50/minute", "usable"):
        assert part in shown
    assert f"{datetime.now(UTC) + timedelta(days=7):%Y-%m-%d}" in shown
    captune("revoke", id)
    (shown,) = (line for line in captune("list").splitlines() if line.startswith(id))
    assert shown.endswith("revoked")
    (root,) = (line.split()[0] for line in captune("list").splitlines() if " root " in line)
    assert "make another first" in captune("revoke", root, code=1)
    assert "rate_limit" in captune("create", "--owner", "carl", "--rate-limit", "lots", code=2)


# -- closing pages -----------------------------------------------------------------------------------------------------


def with_settings(core: Core, **settings: Any) -> TestClient:
    changed = Core(core.settings.model_copy(update=settings), core.db, core.queue, core.store)
    return client(create_api("Captune", changed, ROUTERS), None)


def test_metrics_can_be_closed(api: Api, core: Core) -> None:
    assert with_settings(core, metrics="open").get("/metrics").status_code == 200
    assert_problem(with_settings(core, metrics="off").get("/metrics"), 404, "not_found")
    token = type(core.settings.redis_url)("what the scraper shows")
    for closed in (with_settings(core, metrics="key", metrics_token=token), with_settings(core, metrics="key")):
        assert_problem(closed.get("/metrics"), 401, "unauthorized")
        wrong = {"Authorization": "Bearer what the scraper show"}
        assert_problem(closed.get("/metrics", headers=wrong), 401, "unauthorized")
        anna = {"Authorization": api.anna.headers["authorization"]}
        assert_problem(closed.get("/metrics", headers=anna), 403, "missing_scope")
        admin = {"Authorization": api.admin.headers["authorization"]}
        assert "captune_queue_depth" in closed.get("/metrics", headers=admin).text
    scraper = {"Authorization": "Bearer what the scraper shows"}
    assert with_settings(core, metrics="key", metrics_token=token).get("/metrics", headers=scraper).status_code == 200
    assert_problem(closed.get("/metrics", headers=scraper), 401, "unauthorized")
    assert_problem(with_settings(core, metrics_token=token).get("/v1/datasets", headers=scraper), 401, "unauthorized")


def test_the_documentation_can_be_closed(core: Core) -> None:
    closed = with_settings(core, docs=False)
    for path in ("/docs", "/redoc", "/openapi.json", "/docs-assets/swagger-ui.css"):
        body = assert_problem(closed.get(path), 404, "not_found")
        assert "/docs" not in body["detail"]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_documentation_needs_nothing_from_elsewhere(core: Core, page: str) -> None:
    nobody = with_settings(core)
    answer = nobody.get(page)
    assert answer.status_code == 200
    loaded = {part.split('"')[0] for name in ('src="', 'href="') for part in answer.text.split(name)[1:]}
    assert len(loaded) >= 2, answer.text
    for address in loaded:
        assert address.startswith("/docs-assets/"), address
        assert nobody.get(address).status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "http" not in policy, policy
    assert nobody.get("/openapi.json").json()["paths"]
