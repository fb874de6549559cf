"""Losing all of Redis, or any worker, loses no job."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from subprocess import Popen

from shared.core import Core
from shared.jobs.reconciler import recover_lapsed, requeue_forgotten
from tests.integration.factories import LONG_AGO, add_job, change_job, read_job, types_of
from tests.integration.support import wait_for


def test_a_job_committed_while_redis_was_down_is_enqueued_later(core: Core, core_without_redis: Core) -> None:
    job_id = add_job(core_without_redis, "fine_tune")
    assert read_job(core, job_id).status == "queued"
    assert core.queue.waiting("fine_tune") == set()
    assert requeue_forgotten(core) == 1
    assert core.queue.waiting("fine_tune") == {job_id}


def test_flushall_loses_nothing_and_nothing_is_enqueued_twice(core: Core) -> None:
    jobs = {kind: {add_job(core, kind) for _ in range(3)} for kind in ("ingest", "caption", "fine_tune", "evaluate")}
    assert all(core.queue.waiting(kind) == ids for kind, ids in jobs.items())
    core.queue.redis.flushall()
    assert requeue_forgotten(core) == 12
    assert all(core.queue.waiting(kind) == ids for kind, ids in jobs.items())
    assert requeue_forgotten(core) == 0
    assert {kind: core.queue.depth(kind) for kind in jobs} == dict.fromkeys(jobs, 3)


def test_only_what_is_queued_and_due_is_enqueued(core: Core) -> None:
    for status in ("running", "paused", "succeeded", "failed", "cancelled"):
        add_job(core, status=status)
    backing_off = add_job(core, run_after=datetime.now(UTC) + timedelta(hours=1))
    core.queue.redis.flushall()
    assert requeue_forgotten(core) == 0
    change_job(core, backing_off, run_after=LONG_AGO)
    assert requeue_forgotten(core) == 1


def test_a_job_just_queued_is_left_to_the_request_that_made_it(core: Core) -> None:
    patient = Core(core.settings.model_copy(update={"requeue_after_seconds": 60}), core.db, core.queue, core.store)
    job_id = add_job(core)
    core.queue.redis.flushall()
    assert requeue_forgotten(patient) == 0
    change_job(core, job_id, queued_at=LONG_AGO)
    assert requeue_forgotten(patient) == 1


def test_a_lapsed_lease_is_found_and_a_live_one_is_not(core: Core) -> None:
    dead = add_job(core, status="running", attempt=1, lease_until=LONG_AGO)
    live = add_job(core, status="running", attempt=1, lease_until=datetime.now(UTC) + timedelta(hours=1))
    assert recover_lapsed(core) == 1
    assert (read_job(core, dead).status, read_job(core, live).status) == ("queued", "running")
    assert core.queue.waiting("caption") == {dead}


def test_reconcilers_at_once_count_a_lapse_once(core: Core) -> None:
    jobs = [add_job(core, status="running", attempt=1, lease_until=LONG_AGO) for _ in range(10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(recover_lapsed, [core] * 4))
    assert sum(found) == 10
    for job_id in jobs:
        job = read_job(core, job_id)
        assert (job.status, job.failures) == ("queued", 1)
        assert types_of(core, job_id) == ["job.created", "job.requeued"]
    assert core.queue.depth("caption") == 10


def test_the_process_does_it_again_and_again_and_ends_on_sigterm(
    core: Core, core_without_redis: Core, spawn: Callable[..., Popen[bytes]]
) -> None:
    forgotten = add_job(core_without_redis)
    dead = add_job(core, "evaluate", status="running", attempt=1, lease_until=LONG_AGO)
    process = spawn("shared.jobs.reconciler")
    wait_for(lambda: core.queue.waiting("caption") == {forgotten} and core.queue.waiting("evaluate") == {dead})
    core.queue.redis.flushall()
    wait_for(lambda: core.queue.waiting("caption") == {forgotten} and core.queue.waiting("evaluate") == {dead})
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
