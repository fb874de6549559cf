"""Every fault does what its name says: a harness whose faults miss would pass anything."""

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import psycopg
import pytest
from redis import ConnectionError as RedisGone
from redis import OutOfMemoryError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from services.embedded.processes import in_session
from shared.db.models import Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.queue import JobQueue, connect
from tests.faults.bench import ROOT, Bench, during, soon
from tests.faults.inject import FAULTS, duplicate, heal, model_server, postgres
from tests.faults.inject.base import PROCESSES, WORKERS
from tests.faults.inject.clock import HOUR
from tests.faults.inside.fault_points import EDGES

RNG = random.Random(0)


def add_job(world: Bench, status: str = "queued") -> str:
    job_id = new_id("ds")
    with world.core.db.transaction() as session:
        ledger.create(session, id=job_id, kind="ingest", owner="anna", request={}).status = status
    return job_id


def test_every_fault_has_its_own_name_and_a_group() -> None:
    groups = {"kill", "edge", "term", "freeze", "redis", "postgres", "storage", "duplicate", "clock", "model_server"}
    assert {fault.group for fault in FAULTS.values()} == groups
    assert all(name == fault.name and 0 <= fault.seconds[0] <= fault.seconds[1] for name, fault in FAULTS.items())
    assert {f"edge:{name}:kill" for name in EDGES} - {"edge:poke:kill"} <= set(FAULTS)


# -- processes ---------------------------------------------------------------------------------------------------------


def test_kill(world: Bench) -> None:
    for name in PROCESSES:
        world.named[name] = (process := subprocess.Popen(["sleep", "60"])).pid
        FAULTS[f"kill_{name.replace('-', '_')}"].begin(world, RNG)
        assert process.wait(5) == -signal.SIGKILL
        FAULTS[f"kill_{name.replace('-', '_')}"].begin(world, RNG)  # gone already
    workers = {name: subprocess.Popen(["sleep", "60"]) for name in WORKERS}
    world.named = {name: process.pid for name, process in workers.items()}
    FAULTS["kill_all_workers"].begin(world, RNG)
    assert {process.wait(5) for process in workers.values()} == {-signal.SIGKILL}


def test_kill_work_horse(world: Bench) -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    soon(lambda: len(in_session(parent.pid)) == 2)
    world.named = {"worker-fine_tune": parent.pid}
    FAULTS["kill_work_horse"].begin(world, RNG)
    assert parent.wait(5) == 0, "its child was killed, not the worker"
    alone = subprocess.Popen(["sleep", "60"], start_new_session=True)
    world.named = {"worker-fine_tune": alone.pid}
    FAULTS["kill_work_horse"].begin(world, RNG)
    assert alone.wait(5) == -signal.SIGKILL


def test_term(world: Bench) -> None:
    count = "import signal; signal.signal(15, lambda *_: print('term', flush=True)); print('up', flush=True)\n"
    count += "while True: signal.pause()"
    for once, expected in ((True, ["up", "term"]), (False, ["up", "term", "term"])):
        process = subprocess.Popen([sys.executable, "-c", count], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        heard = [process.stdout.readline().strip()]
        world.named = {"api": process.pid}
        with during(FAULTS["term_api" if once else "term_twice_api"], world, RNG):
            heard.append(process.stdout.readline().strip())
        time.sleep(0.1)
        process.kill()
        heard += process.communicate()[0].split()
        assert heard[: len(expected)] == expected
        assert len(heard) <= len(expected) + (not once), "the second end may send it once more"


def test_freeze(world: Bench) -> None:
    with during(FAULTS["freeze_worker_ingest"], world, RNG):
        soon(lambda: world.worker.state == "T")
    soon(lambda: world.worker.state == "S")
    FAULTS["freeze_worker_ingest"].begin(world, RNG)
    heal(world)
    assert world.worker.do("1 + 1") == "2"


def test_a_frozen_server_is_a_black_hole(world: Bench) -> None:
    with postgres.connect(world) as open_before, during(FAULTS["freeze_postgres"], world, RNG):
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            postgres.connect(world)
        assert not open_before.closed
    assert world.core.db.check() is None  # type: ignore[func-returns-value]
    with during(FAULTS["freeze_valkey"], world, RNG):
        client = connect(world.redis_url)
        client.connection_pool.connection_kwargs["socket_timeout"] = 0.2
        with pytest.raises(Exception, match=r"(?i)timeout"):
            client.ping()
    world.core.queue.ping()


def test_clock(world: Bench) -> None:
    def ahead(clock: str = "__import__('time').time()") -> int:
        return round((float(world.api.do(clock)) - time.time()) / HOUR)

    with during(FAULTS["clock_back_api"], world, RNG):
        soon(lambda: ahead() == -1)
        assert ahead("__import__('datetime').datetime.now().timestamp()") == -1
        assert abs(float(world.api.do("__import__('time').monotonic()")) - time.monotonic()) < 5
    soon(lambda: ahead() == 0)
    with during(FAULTS["clock_ahead_api"], world, RNG):
        soon(lambda: ahead() == 1)
    soon(lambda: ahead() == 0)


# -- Redis -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["redis_killed", "redis_terminated"])
def test_redis_goes_and_comes_back_at_the_same_address(world: Bench, name: str) -> None:
    world.core.queue.redis.set("kept", name)
    time.sleep(1.1)  # the append-only file is synced every second
    before = world.pid("valkey")
    FAULTS[name].begin(world, RNG)
    soon(lambda: world.pid("valkey") != before)
    soon(lambda: _answers(world))
    assert world.core.queue.redis.get("kept") == name.encode()


def _answers(world: Bench) -> bool:
    try:
        world.core.queue.ping()
    except RedisGone:
        return False
    return True


def test_redis_flushall(world: Bench) -> None:
    assert world.core.queue.enqueue("ingest", "ds_1")
    FAULTS["redis_flushall"].begin(world, RNG)
    assert world.core.queue.waiting("ingest") == set()


def test_redis_out_of_memory(world: Bench) -> None:
    with during(FAULTS["redis_oom"], world, RNG):
        assert not world.core.queue.enqueue("ingest", "ds_1")
        with pytest.raises(OutOfMemoryError):
            world.core.queue.redis.set("a", "b")
    assert world.core.queue.enqueue("ingest", "ds_1")


def test_redis_pause(world: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.inject.redis.PAUSE_SECONDS", 0.6)
    began = time.monotonic()
    FAULTS["redis_pause"].begin(world, RNG)
    world.core.queue.ping()
    assert 0.4 < time.monotonic() - began < 5


def test_redis_connections(world: Bench) -> None:
    client = connect(world.redis_url)
    client.ping()
    before = client.client_id()
    FAULTS["redis_connections"].begin(world, RNG)
    client.ping()
    assert client.client_id() != before, "it was hung up on and connected again"


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["postgres_killed", "postgres_restarted"])
def test_postgres_goes_and_comes_back_at_the_same_address(world: Bench, name: str) -> None:
    job_id, before = add_job(world), world.pid("postgres")
    FAULTS[name].begin(world, RNG)
    soon(lambda: world.pid("postgres") != before, 20)
    connection = postgres.patiently(world)
    assert connection is not None
    with connection:
        assert connection.execute("SELECT count(*) FROM jobs WHERE id = %s", (job_id,)).fetchone() == (1,)


@pytest.mark.parametrize("name", ["postgres_backend_killed", "postgres_connections"])
def test_postgres_connections_are_cut(world: Bench, name: str) -> None:
    soon(lambda: postgres.connect(world).close() is None)
    with postgres.connect(world) as connection:
        before = world.pid("postgres")
        FAULTS[name].begin(world, RNG)
        soon(lambda: _is_cut(connection))
    again = postgres.patiently(world)
    assert again is not None
    again.close()
    assert world.pid("postgres") == before, "the server itself stays"


def _is_cut(connection: "psycopg.Connection[Any]") -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def test_postgres_lock(world: Bench) -> None:
    with during(FAULTS["postgres_lock"], world, random.Random(1)), postgres.connect(world) as connection:
        query = "SELECT relation::regclass::text FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted"
        tables = [name for (name,) in connection.execute(query).fetchall()]
        assert len(tables) == 1
        connection.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            connection.execute(f"SELECT count(*) FROM {tables[0]}")
    with postgres.connect(world) as connection:
        soon(lambda: connection.execute(query).fetchall() == [])


@pytest.mark.parametrize(
    ("name", "sqlstate"),
    [
        ("postgres_serialization_failure", "40001"),
        ("postgres_serialization_failure_at_commit", "40001"),
        ("postgres_deadlock", "40P01"),
        ("postgres_disk_full", "53100"),
    ],
)
def test_postgres_refuses(world: Bench, name: str, sqlstate: str) -> None:
    soon(lambda: postgres.connect(world).close() is None)
    with during(FAULTS[name], world, RNG):
        states: set[object] = set()
        soon(lambda: sqlstate in (states.add(_refusal(world)) or states))  # type: ignore[func-returns-value]
        assert states <= {sqlstate, None}
        with world.core.db.transaction() as session:
            assert session.execute(text("SELECT 1")).scalar() == 1, "reading goes on"
    add_job(world)


def _refusal(world: Bench) -> object:
    try:
        add_job(world)
    except DBAPIError as error:
        return getattr(error.orig, "sqlstate", "")
    return None


# -- wake-ups ----------------------------------------------------------------------------------------------------------


def test_wake_ups_nobody_should_trust(world: Bench) -> None:
    job_id, done = add_job(world), add_job(world, "succeeded")
    queue, redis = world.core.queue, world.core.queue.redis
    FAULTS["duplicate_delivery"].begin(world, RNG)
    assert (queue.waiting("ingest"), queue.depth("ingest")) == ({job_id}, 3)
    FAULTS["delivery_of_a_finished_job"].begin(world, RNG)
    assert queue.waiting("ingest") == {job_id, done}
    FAULTS["wrong_queue"].begin(world, RNG)
    assert sum(job_id in queue.waiting(kind) for kind in ("caption", "fine_tune", "evaluate")) == 1
    redis.flushall()
    FAULTS["unknown_job"].begin(world, RNG)
    assert sum(queue.depth(kind) for kind in ("ingest", "caption", "fine_tune", "evaluate")) == 4


def test_a_worker_is_not_moved_by_forged_payloads(world: Bench) -> None:
    """And goes on: the job behind them is claimed. On its way it passes the edges of a job's life."""
    edges = ("dequeue_claim", "claim_first_step", "step", "final_committed", "done_acknowledged")
    for edge in edges:
        world.edges.arm(edge, "worker-ingest", "sleep:0")
    job_id = add_job(world)
    marker = duplicate.forged_marker(world)
    duplicate.forge(world.core.queue.redis, "ingest", marker)
    world.core.queue.enqueue("ingest", job_id)
    code = "import shared.jobs.worker as worker; worker.RECONNECT_SECONDS = 0.05; worker.main('ingest')"
    log = world.state_dir / "worker.log"
    with log.open("wb") as out:
        env = {**os.environ, **world.environment, "CAPTUNE_WORKER": "worker-ingest"}
        process = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=ROOT, stdout=out, stderr=out)

    def claimed() -> bool:
        assert process.poll() is None, log.read_text()
        with world.core.db.transaction() as session:
            return session.get_one(Job, job_id).attempt > 0

    try:
        soon(claimed, 20)
        soon(lambda: not list(world.edges.directory.glob("*@worker-ingest.armed")))
    finally:
        process.kill()
        process.wait()
    assert not marker.exists()


# -- the model server --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*model_server.BEHAVIOURS, "gone"}))
def test_model_server(world: Bench, name: str) -> None:
    with during(FAULTS[f"model_server_{name}"], world, RNG):
        assert _asked(world) != "a red fox"
    assert _asked(world) == "a red fox"


def _asked(world: Bench) -> object:
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]}
    try:
        url = f"http://127.0.0.1:{world.models.port}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=0.3, trust_env=False)
        return answer.json()["choices"][0]["message"]["content"] if answer.is_success else answer.status_code
    except (httpx.HTTPError, ValueError, LookupError) as error:
        return type(error)


def test_heal_ends_what_lasts(world: Bench) -> None:
    lasting = (
        "redis_oom",
        "postgres_disk_full",
        "storage_full",
        "model_server_500",
        "freeze_valkey",
        "freeze_postgres",
    )
    for name in lasting:
        FAULTS[name].begin(world, RNG)
    heal(world)
    assert JobQueue(connect(world.redis_url)).enqueue("ingest", add_job(world))
    assert not list(world.edges.directory.glob("*.armed"))
    assert _asked(world) == "a red fox"
