"""Many streams at once: one reader for all, limits, and who may go on listening."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event, func, text

from shared.core import Core
from shared.db.models import ApiKey, Job
from shared.jobs import ledger, streams
from shared.jobs.streams import Streams
from tests.integration.factories import add_dataset, add_job, caption_request
from tests.integration.support import Api, wait_for
from tests.integration.test_events import finish, log, messages

HEADERS = {"Accept": "text/event-stream"}


@pytest.fixture
def jobs(core: Core) -> list[str]:
    dataset_id = add_dataset(core)
    request = caption_request(dataset_id)
    return [add_job(core, request=request, dataset_id=dataset_id, status="running", attempt=1) for _ in range(20)]


@pytest.fixture
def listen(api: Api, base_url: str) -> Iterator[Callable[..., httpx.Response]]:
    """Opens a stream, with anna's key."""
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=base_url, timeout=10, limits=httpx.Limits()))
        client.headers["Authorization"] = api.anna.headers["authorization"]

        def open(job_id: str, **headers: str) -> httpx.Response:
            path = f"/v1/caption_jobs/{job_id}/events"
            return stack.enter_context(client.stream("GET", path, headers=HEADERS | headers))

        yield open


def open_streams(app: FastAPI) -> int:
    held: Streams = app.state.streams
    return held._open.total()


@pytest.fixture
def limits(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set(most: int, most_per_owner: int) -> None:
        monkeypatch.setattr(app.state.streams, "_most", most)
        monkeypatch.setattr(app.state.streams, "_most_per_owner", most_per_owner)

    wait_for(lambda: open_streams(app) == 0)
    return set


def test_however_many_streams_the_ledger_is_asked_once_a_tick(
    core: Core, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    coming = [messages(listen(job_id)) for job_id in jobs]
    for each in coming:
        assert next(each)[2]["type"] == "job.created"
    asked: list[str] = []

    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(core.db.engine, "before_cursor_execute", count)
    try:
        time.sleep(0.5)
        assert 0 < len(asked) <= 0.5 / streams.TICK + 2
    finally:
        event.remove(core.db.engine, "before_cursor_execute", count)
    for number, job_id in enumerate(jobs):
        log(core, job_id, f"to {number}")
    assert [next(each)[2]["message"] for each in coming] == [f"to {number}" for number in range(len(jobs))]


def test_streams_of_one_job_at_different_places_each_go_on_from_theirs(
    core: Core, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    log(core, jobs[0], *map(str, range(450)))  # over two pages
    finish(core, jobs[0])
    for last in (0, 1, 7, 200, 451, 452):
        *events, done = messages(listen(jobs[0], **{"Last-Event-ID": str(last)}))
        assert [number for _, number, _ in events] == list(range(last + 1, 453))
        assert done[0] == "done"


@pytest.mark.parametrize("named", ["²", "-1", "1e3", "9" * 5, "9" * 30, "2147483648", "x\u0660"])
def test_a_last_event_id_that_no_event_has(
    core: Core, jobs: list[str], listen: Callable[..., httpx.Response], named: str
) -> None:
    finish(core, jobs[0])
    got = [name for name, _, _ in messages(listen(jobs[0], **{"Last-Event-ID": named.encode()}))]  # type: ignore[arg-type]
    assert got == (["done"] if named == "99999" else ["event", "event", "done"])


def test_a_reader_that_takes_nothing_holds_nobody_up(
    core: Core, app: FastAPI, api: Api, base_url: str, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    with core.transaction() as session:
        for _ in range(100):  # 10 MB: more than the sockets' buffers
            ledger.add_event(session, jobs[0], "log", "x" * 100_000)
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle:
        asked = f"GET /v1/caption_jobs/{jobs[0]}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        idle.sendall(f"{asked}Authorization: {api.anna.headers['authorization']}\r\n\r\n".encode())
        wait_for(lambda: open_streams(app) == 1)
        coming = messages(listen(jobs[1]))
        next(coming)
        began = time.monotonic()
        for number in range(5):
            log(core, jobs[1], str(number))
            assert next(coming)[2]["message"] == str(number)
        assert time.monotonic() - began < 3
        assert open_streams(app) == 2
    wait_for(lambda: open_streams(app) == 1, 5)


def test_a_reader_that_takes_nothing_for_long_is_let_go(
    core: Core, app: FastAPI, api: Api, base_url: str, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALLED", 0.3)
    monkeypatch.setattr(streams, "PAGE", 20)
    with core.transaction() as session:
        for _ in range(100):
            ledger.add_event(session, jobs[0], "log", "x" * 100_000)
    host, port = base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle:
        asked = f"GET /v1/caption_jobs/{jobs[0]}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        idle.sendall(f"{asked}Authorization: {api.anna.headers['authorization']}\r\n\r\n".encode())
        wait_for(lambda: open_streams(app) == 1)
        wait_for(lambda: open_streams(app) == 0, 5)


def test_over_the_limit_a_stream_is_refused_and_a_closed_one_makes_room(
    core: Core,
    app: FastAPI,
    api: Api,
    base_url: str,
    jobs: list[str],
    limits: Callable[[int, int], None],
    listen: Callable[..., httpx.Response],
) -> None:
    limits(3, 2)
    own = httpx.Client(base_url=base_url, headers=HEADERS | {"Authorization": api.anna.headers["authorization"]})
    path = f"/v1/caption_jobs/{jobs[0]}/events"
    with ExitStack() as two:
        for _ in range(2):
            two.enter_context(own.stream("GET", path))
        refused = listen(jobs[0])
        refused.read()
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["Retry-After"] == "5"
        root = httpx.Client(base_url=base_url, headers=HEADERS | {"Authorization": api.admin.headers["authorization"]})
        with root.stream("GET", path) as other_owner:
            assert other_owner.status_code == 200
            assert root.get(path).status_code == 429, "the process is full"
    own.close()
    root.close()
    wait_for(lambda: open_streams(app) == 0, 5)
    assert listen(jobs[0]).status_code == 200


def test_a_revoked_key_ends_its_streams_and_no_others(
    core: Core,
    api: Api,
    base_url: str,
    jobs: list[str],
    monkeypatch: pytest.MonkeyPatch,
    listen: Callable[..., httpx.Response],
) -> None:
    monkeypatch.setattr(streams, "KEY_CHECK", 0.2)
    other = httpx.Client(base_url=base_url, headers=HEADERS | {"Authorization": api.reader.headers["authorization"]})
    revoked, kept = messages(listen(jobs[0])), None
    next(revoked)
    with other.stream("GET", f"/v1/caption_jobs/{jobs[0]}/events") as answer:
        kept = messages(answer)
        next(kept)
        with core.transaction() as session:
            row = session.query(ApiKey).where(ApiKey.owner == "anna", ApiKey.scopes.contains(["write"])).one()
            row.revoked_at = row.created_at
        assert list(revoked) == [], "it ends, and without `done`"
        log(core, jobs[0], "a secret")
        assert next(kept)[2]["message"] == "a secret"
    other.close()


def test_a_revoked_key_ends_its_streams_whatever_its_owner_is_called(
    core: Core, base_url: str, monkeypatch: pytest.MonkeyPatch, client_for: Callable[..., TestClient]
) -> None:
    """The service's token, whose streams go on, calls itself by this name."""
    monkeypatch.setattr(streams, "KEY_CHECK", 0.2)
    job = add_job(core, owner="service", request={}, status="running", attempt=1)
    headers = HEADERS | {"Authorization": client_for("service", "read").headers["authorization"]}
    with httpx.stream("GET", f"{base_url}/v1/caption_jobs/{job}/events", headers=headers, timeout=10) as answer:
        coming = messages(answer)
        next(coming)
        with core.transaction() as session:
            session.query(ApiKey).where(ApiKey.owner == "service").one().revoked_at = func.now()
        assert list(coming) == []


def test_streams_outlive_the_databases_connections(
    core: Core, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    coming = messages(listen(jobs[0]))
    assert next(coming)[1] == 1
    with core.db.engine.connect() as connection:
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        connection.execute(text(f"{ended} AND backend_type = 'client backend'"))
    log(core, jobs[0], "after")
    assert next(coming)[::2] != ("done", None)
    finish(core, jobs[0])
    assert [name for name, _, _ in coming][-1] == "done"


def test_the_stream_of_a_deleted_job_ends(core: Core, jobs: list[str], listen: Callable[..., httpx.Response]) -> None:
    coming = messages(listen(jobs[0]))
    next(coming)
    with core.transaction() as session:
        session.delete(session.get_one(Job, jobs[0]))
    assert list(coming) == []


def test_no_event_is_lost_or_doubled_while_many_write(
    core: Core, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    def write(job_id: str) -> None:
        for number in range(60):
            log(core, job_id, str(number))
        finish(core, job_id)

    coming = [(job_id, messages(listen(job_id))) for job_id in jobs[:6]]
    writers = [threading.Thread(target=write, args=(job_id,)) for job_id, _ in coming]
    for writer in writers:
        writer.start()
    for job_id, each in coming:
        first = list(islice(each, 10))
        *rest, done = messages(listen(job_id, **{"Last-Event-ID": str(first[-1][1])}))  # another connection goes on
        assert [number for _, number, _ in first + rest] == list(range(1, 63))
        assert done[0] == "done"
    for writer in writers:
        writer.join()


def test_the_thread_ends_with_the_last_stream(
    app: FastAPI, core: Core, jobs: list[str], listen: Callable[..., httpx.Response]
) -> None:
    held: Streams = app.state.streams
    next(messages(listen(jobs[0])))
    assert held._thread is not None
    finish(core, jobs[0])
    wait_for(lambda: held._thread is None, 5)
