"""A database or a Redis that says nothing any more, or too late: everything that asks it comes to an end."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared import queue as redis_queue
from shared.config import CoreSettings
from shared.core import Core
from shared.db import session as database
from shared.db.models import Job
from shared.db.session import Database, answered_within
from shared.jobs import LeaseLost, ledger
from shared.jobs.claim import Claim
from shared.queue import JobQueue, connect
from shared.web.api import create_api
from tests.integration.black_hole import BlackHole, black_hole
from tests.integration.conftest import ROUTERS
from tests.integration.factories import add_job, read_job
from tests.integration.support import Api, client, wait_for


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A socket's address holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hole-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def hole(settings: CoreSettings, short_folder: Path) -> Iterator[BlackHole]:
    (host,) = parse_qs(urlsplit(settings.database_url.get_secret_value()).query)["host"]
    with black_hole(short_folder / ".s.PGSQL.5432", f"{host}/.s.PGSQL.5432") as made:
        yield made


@pytest.fixture
def url(settings: CoreSettings, hole: BlackHole, short_folder: Path) -> str:
    """The same database, through the hole."""
    return settings.database_url.get_secret_value().partition("?")[0] + f"?host={short_folder}"


@pytest.fixture
def far_core(core: Core, url: str) -> Iterator[Core]:
    """`core` with its database behind the hole, and leases of a second."""
    settings = core.settings.model_copy(update={"lease_seconds": 1.0})
    far = Core(settings, Database(url, 4), core.queue, core.store)
    yield far
    far.close()


def one(session: Session) -> object:
    return session.scalar(text("SELECT 1"))


def test_an_answer_that_does_not_come_is_not_waited_for(url: str, hole: BlackHole) -> None:
    db = Database(url, 1, answer_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(OperationalError), db.transaction() as session:  # noqa: PT012
        one(session)
        hole.swallow()
        one(session)
    assert time.monotonic() - began < 5
    hole.let_pass()
    with db.transaction() as session:
        assert one(session) == 1, "on a new connection"
    db.close()


def test_a_connection_that_went_dead_in_the_pool_is_noticed_at_the_first_ping(
    url: str, hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PING_SECONDS", 0.3)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 2)
    db = Database(url, 1)  # no bound on answers
    with db.transaction() as session:
        one(session)
    hole.swallow()
    with pytest.raises(OperationalError), db.transaction() as session:
        one(session)
    hole.let_pass()
    with db.transaction() as session:
        assert one(session) == 1
    db.close()


def test_a_statement_and_an_idle_transaction_have_an_end_in_an_api_and_a_worker_has_time(
    settings: CoreSettings,
) -> None:
    api = Core.from_settings(settings.model_copy(update={"statement_seconds": 0.2}), api=True)
    with pytest.raises(OperationalError, match="statement timeout"), api.db.transaction() as session:
        session.execute(text("SELECT pg_sleep(5)"))
    worker = Core.from_settings(settings)
    with worker.db.transaction() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "0"
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "15min"
    api.close()
    worker.close()


def test_settings_in_the_url_come_last(settings: CoreSettings) -> None:
    given = settings.database_url.get_secret_value()
    db = Database(f"{given}&options=-c%20statement_timeout%3D7000&connect_timeout=9", statement_seconds=3)
    with db.transaction() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "7s"
    db.close()


def test_a_request_that_gets_no_connection_is_503(
    core: Core, app: FastAPI, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "POOL_SECONDS", 0.2)
    tight = Database(core.settings.database_url.get_secret_value(), 1)
    crowded = create_api("Captune", Core(core.settings, tight, core.queue, core.store), ROUTERS)
    asking = client(crowded, api.anna.headers["authorization"].removeprefix("Bearer "))
    held = [tight.engine.connect() for _ in range(11)]
    answer = asking.get("/v1/caption_jobs")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    for connection in held:
        connection.close()
    assert asking.get("/v1/caption_jobs").status_code == 200
    tight.close()


def running(core: Core) -> Job:
    job_id = add_job(core)
    with core.transaction() as session:
        job = ledger.claim(session, job_id, "caption", "here", core.settings.lease_seconds)
    assert job is not None
    return job


def lost(claim: Claim) -> bool:
    try:
        claim.check()
    except LeaseLost:
        return True
    return False


def test_a_worker_hears_that_it_lost_its_lease_though_the_database_is_silent(
    core: Core, far_core: Core, hole: BlackHole
) -> None:
    with Claim(far_core, running(far_core), threading.Event()) as claim:
        hole.swallow()
        wait_for(lambda: lost(claim), 3 * far_core.settings.lease_seconds)
        hole.let_pass()


def test_a_heartbeat_that_was_swallowed_is_not_the_last(core: Core, far_core: Core, hole: BlackHole) -> None:
    far_core.settings.lease_seconds = 6.0
    job = running(far_core)
    with Claim(far_core, job, threading.Event()) as claim:
        with core.transaction() as session:  # the heartbeat waits for the row, then for an answer that is lost
            session.get_one(Job, job.id, with_for_update=True)
            time.sleep(1.3)
            hole.swallow()
        time.sleep(0.3)
        hole.let_pass()
        before = read_job(core, job.id).lease_until
        wait_for(lambda: read_job(core, job.id).lease_until != before, 6)
        claim.check()


def test_a_transaction_longer_than_the_lease_does_not_lose_it(core: Core, far_core: Core) -> None:
    """It holds the row that the heartbeat wants; nobody else can take the job meanwhile."""
    with Claim(far_core, running(far_core), threading.Event()) as claim:
        with claim.transaction():
            time.sleep(2.2 * far_core.settings.lease_seconds)
        claim.check()


def test_within_ends_with_its_block(url: str, hole: BlackHole) -> None:
    db = Database(url, 1)
    with pytest.raises(OperationalError), answered_within(0.3), db.transaction() as session:
        session.execute(text("SELECT pg_sleep(2)"))
    with db.transaction() as session:
        session.execute(text("SELECT pg_sleep(0.5)"))
    db.close()


def test_a_silent_redis_is_asked_once_and_then_left_alone(
    short_folder: Path, settings: CoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_queue, "UNHEARD_SECONDS", 1.0)
    target = urlsplit(settings.redis_url.get_secret_value()).path
    with black_hole(short_folder / "redis.sock", target) as hole:
        queue = JobQueue(connect(f"unix://{short_folder}/redis.sock"))
        assert queue.enqueue("caption", "cap_1")
        hole.swallow()
        began = time.monotonic()
        assert not queue.enqueue("caption", "cap_2")
        first = time.monotonic() - began
        assert first < 8
        began = time.monotonic()
        assert not queue.enqueue("caption", "cap_3")
        assert time.monotonic() - began < 0.1, "a thousand requests must not each wait for it"
        hole.let_pass()
        wait_for(lambda: queue.enqueue("caption", "cap_4"), 10)
        queue.redis.close()


def test_a_transaction_that_the_server_ended_for_idleness_is_no_internal_error(core: Core) -> None:
    def idle() -> None:
        with core.transaction() as session:
            session.execute(text("SET idle_in_transaction_session_timeout = 50"))
            time.sleep(0.5)
            session.execute(text("SELECT 1"))

    with pytest.raises(OperationalError):
        idle()
    with core.transaction() as session:
        assert session.scalar(text("SELECT 1")) == 1
