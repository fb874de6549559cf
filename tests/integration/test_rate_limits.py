"""How often a key may ask, how often an address may be wrong; and that an outage of Redis closes nothing."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from shared.config import CoreSettings
from shared.core import Core
from shared.web.api import create_api
from shared.web.auth import Scope, create_key
from shared.web.rate_limit import AWAY_SECONDS, RateLimits
from tests.integration.conftest import ROUTERS
from tests.integration.factories import archive
from tests.integration.support import DEAD_REDIS
from tests.integration.test_keys import statements
from tests.integration.test_web import assert_problem

PATH = "/v1/fine_tuning/methods"
App = Callable[..., FastAPI]


@pytest.fixture
def limited(core: Core) -> App:
    """`limited(rate_limit="3/minute")`: an application, as another process would have it."""

    def make(**settings: Any) -> FastAPI:
        changed = Core(core.settings.model_copy(update=settings), core.db, core.queue, core.store)
        return create_api("Captune", changed, ROUTERS)

    return make


@pytest.fixture
def key(core: Core) -> Callable[..., str]:
    def make(*scopes: Scope, rate_limit: str | None = None) -> str:
        with core.transaction() as session:
            return create_key(session, owner="anna", name="", scopes=scopes or ("read",), rate_limit=rate_limit)[1]

    return make


def at(app: FastAPI, secret: str, address: str = "192.0.2.1") -> TestClient:
    headers = {"Authorization": f"Bearer {secret}"}
    return TestClient(app, headers=headers, client=(address, 4711), raise_server_exceptions=False)


def statuses(client: TestClient, times: int) -> list[int]:
    return [client.get(PATH).status_code for _ in range(times)]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_over_its_limit_is_told_to_wait(limited: App, key: Callable[..., str]) -> None:
    app = limited(rate_limit="3/minute")
    anna, other = at(app, key()), at(app, key())
    assert statuses(anna, 3) == [200] * 3
    answer = anna.get(PATH)
    assert_problem(answer, 429, "rate_limited")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert statuses(other, 3) == [200] * 3, "each key has its own"


def test_it_may_go_on_after_the_time_told(limited: App, key: Callable[..., str]) -> None:
    anna = at(limited(rate_limit="2/second"), key())
    found = statuses(anna, 6)
    assert 429 in found, found
    answer = next(answer for _ in range(20) if (answer := anna.get(PATH)).status_code == 429)
    time.sleep(int(answer.headers["Retry-After"]))
    assert anna.get(PATH).status_code == 200


def test_a_key_may_have_a_limit_of_its_own(limited: App, key: Callable[..., str]) -> None:
    app = limited(rate_limit="3/minute")
    assert statuses(at(app, key(rate_limit="1/hour")), 2) == [200, 429]
    assert statuses(at(app, key(rate_limit="off")), 10) == [200] * 10
    assert statuses(at(limited(rate_limit="off"), key()), 10) == [200] * 10


def test_all_processes_count_together(limited: App, key: Callable[..., str]) -> None:
    secret = key()
    one, two = (at(limited(rate_limit="4/minute"), secret) for _ in range(2))
    assert statuses(one, 2) + statuses(two, 2) == [200] * 4
    assert (one.get(PATH).status_code, two.get(PATH).status_code) == (429, 429)


def test_the_workers_token_has_no_limit(limited: App) -> None:
    assert statuses(at(limited(rate_limit="1/hour"), "the service token"), 5) == [200] * 5


def test_an_upload_counts_once(limited: App, key: Callable[..., str]) -> None:
    """Its key is looked at before its body is read, and again before it is taken."""
    anna = at(limited(rate_limit="2/minute"), key("write"))
    for name in ("a", "b"):
        form = {"name": name, "domain": "pets"}
        answer = anna.post("/v1/datasets", data=form, files={"file": ("pets.zip", archive())})
        assert answer.status_code == 202, answer.text
    assert anna.get(PATH).status_code == 429


def test_two_hundred_pollers_of_one_key_pass(core: Core) -> None:
    """The default limit; 500 requests at once are more than the API answers in the second that they are counted in."""
    settings = CoreSettings.model_fields
    limits = RateLimits(core.settings.redis_url.get_secret_value(), settings["rate_limit"].default, "off")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: limits.count("key_1", None), range(500)))
    limits.close()


# -- wrong keys --------------------------------------------------------------------------------------------------------


def test_wrong_keys_do_not_reach_the_database_for_ever(limited: App, key: Callable[..., str], core: Core) -> None:
    app = limited(failed_auth_limit="5/minute")
    for number in range(5):
        assert at(app, f"ck_{number}").get(PATH).status_code == 401
    answer = at(app, "ck_5").get(PATH)
    assert_problem(answer, 429, "too_many_failures")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    with statements(core, "") as ran:
        assert [at(app, f"ck_{number}").get(PATH).status_code for number in range(20)] == [429] * 20
        files = {"file": ("pets.zip", archive())}
        upload = at(app, "ck_wrong").post("/v1/datasets", data={"name": "a"}, files=files)
        assert_problem(upload, 429, "too_many_failures")
    assert ran == []
    assert at(app, "ck_1", "192.0.2.2").get(PATH).status_code == 401, "another address"
    assert at(app, key(), "192.0.2.2").get(PATH).status_code == 200


def test_who_shares_an_address_with_one_that_guesses_is_not_shut_out(limited: App, key: Callable[..., str]) -> None:
    app = limited(failed_auth_limit="2/minute")
    anna = at(app, key())
    assert anna.get(PATH).status_code == 200
    assert statuses(at(app, "ck_wrong"), 4) == [401, 401, 429, 429]
    assert statuses(anna, 3) == [200] * 3
    assert at(app, "the service token").get(PATH).status_code == 200


def test_a_revoked_key_is_a_wrong_one(limited: App, core: Core) -> None:
    app = limited(failed_auth_limit="2/minute")
    with core.transaction() as session:
        row, secret = create_key(session, owner="anna", name="", scopes=("read",))
    anna = at(app, secret)
    assert anna.get(PATH).status_code == 200
    with core.transaction() as session:
        session.get_one(type(row), row.id).revoked_at = row.created_at
    assert statuses(anna, 3) == [401, 401, 429]
    with statements(core, "") as ran:
        assert anna.get(PATH).status_code == 429
    assert ran == []


def test_no_key_at_all_asks_nothing_and_is_not_counted(limited: App, core: Core) -> None:
    app = limited(failed_auth_limit="1/hour")
    nobody = TestClient(app, client=("192.0.2.1", 1))
    with statements(core, "") as ran:
        assert statuses(nobody, 5) == [401] * 5
    assert ran == []
    assert at(app, "ck_wrong").get(PATH).status_code == 401


# -- without Redis -----------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """A Redis that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["gone", "silent"])
def test_without_redis_the_api_stays_open(
    kind: str, silent: str, limited: App, key: Callable[..., str], core: Core, caplog: pytest.LogCaptureFixture
) -> None:
    url = type(core.settings.redis_url)(DEAD_REDIS if kind == "gone" else silent)
    app = limited(rate_limit="1/hour", failed_auth_limit="1/hour", redis_url=url)
    anna = at(app, key())
    with caplog.at_level(logging.WARNING, logger="shared.web.rate_limit"):
        began = time.monotonic()
        assert statuses(anna, 30) == [200] * 30
        assert time.monotonic() - began < 5, "it is waited for once, not by every request"
        assert statuses(at(app, "ck_wrong"), 3) == [401] * 3
    assert [record.getMessage() for record in caplog.records] == ["Redis does not answer: requests are not limited"]


def test_when_redis_is_back_requests_are_counted_again(
    limited: App, key: Callable[..., str], core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = limited(rate_limit="2/hour")
    anna = at(app, key())
    counter = app.state.rate_limits._counter
    pool = counter._redis.connection_pool
    counter._redis.connection_pool = type(pool).from_url(DEAD_REDIS)
    assert statuses(anna, 3) == [200] * 3
    counter._redis.connection_pool = pool
    assert statuses(anna, 3) == [200] * 3, "left alone for a while"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + AWAY_SECONDS)
    caplog.clear()
    assert statuses(anna, 3) == [200, 200, 429]
    assert [record.getMessage() for record in caplog.records] == ["Redis answers again: requests are limited"]


def test_a_redis_that_was_emptied_or_cut_counts_on(limited: App, key: Callable[..., str], core: Core) -> None:
    app = limited(rate_limit="2/hour")
    anna = at(app, key())
    assert statuses(anna, 2) == [200, 200]
    core.queue.redis.flushall()
    core.queue.redis.script_flush()
    core.queue.redis.client_kill_filter(_type="normal", skipme=True)
    assert statuses(anna, 3) == [200, 200, 429]
    assert not app.state.rate_limits._counter._away
