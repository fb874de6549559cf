"""What a worker does with a job, with tasks small enough to see through."""

import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from redis import ConnectionError as RedisConnectionError
from rq.exceptions import StopRequested
from rq.worker.base import WorkerStatus
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from shared.core import Core
from shared.db.models import Image, Job, JobEvent
from shared.errors import InvalidInput, TooBusy, Unavailable
from shared.jobs import Cancelled, HandedBack, Paused, ledger, worker
from shared.jobs.claim import Claim
from shared.jobs.worker import Runner, Task
from shared.queue import connect
from tests.integration.factories import (
    LONG_AGO,
    add_dataset,
    add_job,
    change_job,
    events_of,
    image_row,
    read_job,
    types_of,
)
from tests.integration.support import DEAD_REDIS

SetTask = Callable[[Task], None]


@pytest.fixture
def runner(core: Core) -> Runner:
    return Runner(core, "caption", "test")


@pytest.fixture
def set_task(monkeypatch: pytest.MonkeyPatch) -> SetTask:
    """Makes a function the task of caption jobs."""
    module = types.ModuleType("tasks_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(worker.TASKS, "caption", f"{module.__name__}:task")

    def put(task: Task) -> None:
        module.task = task  # type: ignore[attr-defined]

    return put


def done(result: dict[str, Any] | None = None) -> Callable[[Session], dict[str, Any]]:
    return lambda _: result or {}


def raising(error: Exception) -> Task:
    def task(claim: Claim) -> Any:
        raise error

    return task


def test_success_keeps_the_result(core: Core, runner: Runner, set_task: SetTask) -> None:
    set_task(lambda claim: done({"captions": claim.request["wanted"]}))
    job_id = add_job(core, request={"wanted": 7})
    runner.run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.result, job.attempt, job.worker) == ("succeeded", {"captions": 7}, 1, "test")
    assert job.finished_at is not None
    assert job.lease_until is None
    assert types_of(core, job_id) == ["job.created", "job.started", "job.succeeded"]


def test_the_last_writes_and_the_status_stand_or_fall_together(core: Core, runner: Runner, set_task: SetTask) -> None:
    dataset_id = add_dataset(core)

    def task(claim: Claim) -> Any:
        def finish(session: Session) -> dict[str, Any]:
            session.add(image_row(core, dataset_id, "anna", 1))
            session.flush()
            raise RuntimeError("the disk is full")

        return finish

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "queued"
    with core.transaction() as session:
        assert session.scalars(select(Image)).all() == []


def test_a_users_error_fails_the_job_at_once_with_its_reason(core: Core, runner: Runner, set_task: SetTask) -> None:
    set_task(raising(InvalidInput("the split 'val' has no images", code="empty_split", param="split")))
    job_id = add_job(core)
    runner.run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.failures) == ("failed", 0)
    assert job.error == {"code": "empty_split", "message": "the split 'val' has no images", "param": "split"}
    last = events_of(core, job_id)[-1]
    assert (last.type, last.level, last.message) == ("job.failed", "error", "the split 'val' has no images")


def seconds_until_due(job: Job) -> float:
    assert job.run_after is not None
    return (job.run_after - datetime.now(UTC)).total_seconds()


def test_an_unexpected_error_is_retried_with_back_off_and_then_given_up(
    core: Core, runner: Runner, set_task: SetTask
) -> None:
    set_task(raising(ZeroDivisionError("a secret of the server")))
    job_id = add_job(core)
    for failures, delay in ((1, 5.0), (2, 20.0)):
        runner.run(job_id)
        job = read_job(core, job_id)
        assert (job.status, job.failures, job.attempt) == ("queued", failures, failures)
        assert delay - 1 < seconds_until_due(job) <= delay
        runner.run(job_id)
        assert read_job(core, job_id).attempt == failures, "not before its time"
        change_job(core, job_id, run_after=LONG_AGO)
    runner.run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.failures) == ("failed", core.settings.max_failures)
    assert job.error is not None
    assert job.error["code"] == "internal_error"
    assert "ZeroDivisionError" in job.error["message"]
    assert not any("secret" in event.message for event in events_of(core, job_id))


@pytest.mark.parametrize(
    ("error", "delay"),
    [
        (Unavailable("the captioner does not answer."), 5.0),
        (TooBusy("the captioner is busy.", retry_after=20), 20.0),
    ],
)
def test_what_may_pass_is_tried_again(
    core: Core, runner: Runner, set_task: SetTask, error: Exception, delay: float
) -> None:
    set_task(raising(error))
    job_id = add_job(core)
    core.queue.redis.flushall()
    runner.run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.failures, job.error) == ("queued", 1, None)
    assert delay - 1 < seconds_until_due(job) <= delay
    assert core.queue.waiting("caption") == set(), "the reconciler enqueues it when it is due"
    assert str(error) in events_of(core, job_id)[-1].message
    set_task(lambda claim: done())
    change_job(core, job_id, run_after=LONG_AGO)
    runner.run(job_id)
    assert read_job(core, job_id).status == "succeeded"


def test_a_failing_job_that_was_cancelled_is_not_retried(core: Core, runner: Runner, set_task: SetTask) -> None:
    def task(claim: Claim) -> Any:
        change_job(core, claim.id, cancel_requested=True)
        raise Unavailable("the captioner does not answer.")

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "cancelled"


def wait_in_task(claim: Claim) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        claim.check()
        time.sleep(0.01)
    raise AssertionError("nothing stopped the task")


def in_background(runner: Runner, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=runner.run, args=(job_id,))
    thread.start()
    deadline = time.monotonic() + 10
    while read_job(runner.core, job_id).status != "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    return thread


def request(core: Core, job_id: str, change: Callable[[Session, Job], None]) -> None:
    with core.transaction() as session:
        change(session, session.get_one(Job, job_id, with_for_update=True))


@pytest.mark.parametrize(
    ("change", "status", "events"),
    [
        (ledger.request_cancel, "cancelled", ["job.cancel_requested", "job.cancelled"]),
        (ledger.request_pause, "paused", ["job.pause_requested", "job.paused"]),
    ],
)
def test_a_running_job_stops_when_the_user_asks(
    core: Core, set_task: SetTask, change: Any, status: str, events: list[str]
) -> None:
    quick = Core(core.settings.model_copy(update={"lease_seconds": 0.8}), core.db, core.queue, core.store)
    set_task(wait_in_task)
    job_id = add_job(core)
    thread = in_background(Runner(quick, "caption", "test"), job_id)
    request(core, job_id, change)
    thread.join(10)
    job = read_job(core, job_id)
    assert (job.status, job.lease_until, job.failures) == (status, None, 0)
    assert not job.cancel_requested
    assert not job.pause_requested
    assert types_of(core, job_id)[2:] == events
    if status == "paused":
        request(core, job_id, ledger.resume)
        set_task(lambda claim: done())
        Runner(core, "caption", "test").run(job_id)
        assert read_job(core, job_id).status == "succeeded"


def test_a_worker_that_is_stopped_hands_its_job_back_at_once(core: Core, runner: Runner, set_task: SetTask) -> None:
    set_task(wait_in_task)
    job_id = add_job(core)
    core.queue.redis.flushall()
    thread = in_background(runner, job_id)
    runner.stopping.set()
    thread.join(10)
    job = read_job(core, job_id)
    assert (job.status, job.failures, job.run_after) == ("queued", 0, None), "being stopped is no failure"
    assert core.queue.waiting("caption") == {job_id}
    set_task(lambda claim: done())
    Runner(core, "caption", "another").run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.attempt, job.worker) == ("succeeded", 2, "another")


def test_a_cancelled_job_ends_even_while_its_worker_stops(core: Core, runner: Runner, set_task: SetTask) -> None:
    def task(claim: Claim) -> Any:
        change_job(core, claim.id, cancel_requested=True)
        runner.stopping.set()
        claim._flags = ledger.Flags(cancel=False, pause=False)  # the heartbeat has not seen it yet
        claim.check()

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "cancelled"


def test_a_task_whose_lease_was_lost_writes_nothing(core: Core, runner: Runner, set_task: SetTask) -> None:
    def task(claim: Claim) -> Any:
        change_job(core, claim.id, attempt=2, worker="another")
        return done({"from": "the dead"})

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    job = read_job(core, job_id)
    assert (job.status, job.result, job.worker) == ("running", None, "another")
    assert types_of(core, job_id) == ["job.created", "job.started"]


def test_an_interrupt_is_no_error_of_the_task(core: Core, runner: Runner, set_task: SetTask) -> None:
    set_task(raising(Cancelled("x")))
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "cancelled"


def test_a_job_delivered_many_times_is_done_once(core: Core, set_task: SetTask) -> None:
    ran: list[int] = []

    def task(claim: Claim) -> Any:
        ran.append(claim.attempt)
        time.sleep(0.05)
        return done()

    set_task(task)
    job_id = add_job(core)
    for _ in range(3):
        core.queue.enqueue("caption", job_id)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: Runner(core, "caption", f"w{n}").run(job_id), range(8)))
    assert ran == [1]
    assert types_of(core, job_id) == ["job.created", "job.started", "job.succeeded"]


def test_a_job_that_does_not_exist_is_nothing_to_do(core: Core, runner: Runner) -> None:
    runner.run("cap_nothing")
    with core.transaction() as session:
        assert session.get(Job, "cap_nothing") is None
        assert session.scalars(select(JobEvent).where(JobEvent.job_id == "cap_nothing")).all() == []


def test_a_job_given_back_by_its_own_run_is_delivered_again(
    core: Core, runner: Runner, set_task: SetTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ deletes a payload when its run ends: the wake-up that this very run sent must not go with it."""
    monkeypatch.setattr(worker._Worker, "_install_signal_handlers", lambda self: None)

    def task(claim: Claim) -> Any:
        if claim.attempt == 1:
            raise HandedBack(claim.id)
        return done()

    set_task(task)
    job_id = add_job(core)
    worker.listen(runner, core.settings.redis_url.get_secret_value(), burst=True)
    job = read_job(core, job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)


def test_progress_wipes_the_failures_before_it(core: Core, runner: Runner, set_task: SetTask) -> None:
    def task(claim: Claim) -> Any:
        with claim.transaction() as session:
            claim.advanced(session)
        raise Unavailable("the captioner does not answer.")

    set_task(task)
    job_id = add_job(core)
    change_job(core, job_id, failures=core.settings.max_failures - 1)
    runner.run(job_id)
    assert (read_job(core, job_id).status, read_job(core, job_id).failures) == ("queued", 1)


def test_a_resume_during_a_pause_is_not_lost(core: Core, runner: Runner, set_task: SetTask) -> None:
    """The user resumes while the worker still saves what it paused for."""

    def task(claim: Claim) -> Any:
        change_job(core, claim.id, pause_requested=False)  # what `resume` does to a running job
        raise Paused(claim.id)

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "queued"


def test_a_report_that_cannot_be_written_does_not_end_the_work(
    core: Core, runner: Runner, set_task: SetTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(claim: Claim) -> Any:
        with monkeypatch.context() as away:
            away.setattr(core.db, "engine", create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
            claim.progress("captioning", 1, 2)
            claim.event("note", "while the database is away")
        return done()

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)
    assert read_job(core, job_id).status == "succeeded"
    assert "note" not in types_of(core, job_id)


def test_an_end_that_cannot_be_written_is_left_to_the_reconciler(
    core: Core, runner: Runner, set_task: SetTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(claim: Claim) -> Any:
        monkeypatch.setattr(core.db, "engine", create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none"))
        raise Unavailable("the captioner does not answer.")

    set_task(task)
    job_id = add_job(core)
    runner.run(job_id)  # raises nothing: RQ would keep the traceback, and call the job failed
    monkeypatch.undo()
    job = read_job(core, job_id)
    assert (job.status, job.failures) == ("running", 0)
    assert job.lease_until is not None


def test_the_operator_says_how_long_a_retry_waits(core: Core, set_task: SetTask) -> None:
    patient = Core(core.settings.model_copy(update={"retry_seconds": 100.0}), core.db, core.queue, core.store)
    set_task(raising(Unavailable("the captioner does not answer.")))
    job_id = add_job(core)
    Runner(patient, "caption", "test").run(job_id)
    assert 99 < seconds_until_due(read_job(core, job_id)) <= 100


def test_an_error_may_ask_for_patience_within_bounds(core: Core, runner: Runner, set_task: SetTask) -> None:
    set_task(raising(Unavailable("the disk is full.", retry_after=3600)))
    job_id = add_job(core)
    runner.run(job_id)
    assert 59 < seconds_until_due(read_job(core, job_id)) <= 60


def test_a_worker_outlives_redis_and_keeps_what_it_has_loaded(
    core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = core.settings
    monkeypatch.setenv("DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("STORAGE_URL", settings.storage_url)
    monkeypatch.setattr(worker, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(worker, "configure", lambda level: None)
    steps: list[str] = []
    monkeypatch.setattr(worker, "load_task", lambda kind: steps.append(f"load {kind}"))

    def listen(runner: Runner, redis_url: str) -> None:
        steps.append("listen")
        if len(steps) < 4:
            raise RedisConnectionError("gone")
        runner.stopping.set()  # SIGTERM

    monkeypatch.setattr(worker, "listen", listen)
    worker.main("ingest")
    assert steps == ["load ingest", "listen", "listen", "listen"]


def test_a_stop_signal_asks_redis_nothing() -> None:
    """Its handler runs in the middle of a job; an error of Redis would be raised there."""
    deaf = worker._Worker(["caption"], connection=connect(DEAD_REDIS), prepare_for_work=False)
    deaf._state = WorkerStatus.BUSY
    deaf._shutdown()
    assert deaf._stop_requested
    deaf._state = WorkerStatus.IDLE
    with pytest.raises(StopRequested):
        deaf._shutdown()
