"""The ledger and the claim: one owner per attempt, and no trace of any other."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.core import Core
from shared.db.models import FINAL, Checkpoint, Image, Job
from shared.errors import Conflict
from shared.jobs import Cancelled, HandedBack, LeaseLost, Paused, ledger
from shared.jobs.claim import Claim
from tests.integration.factories import (
    add_dataset,
    add_job,
    change_job,
    events_of,
    image_row,
    read_job,
    types_of,
)
from tests.integration.support import wait_for

LEASE = 30.0


def take(core: Core, job_id: str, worker: str = "w") -> Job | None:
    with core.transaction() as session:
        return ledger.claim(session, job_id, session.get_one(Job, job_id).kind, worker, LEASE)


def held(core: Core, job_id: str) -> Claim:
    job = take(core, job_id)
    assert job is not None
    return Claim(core, job, threading.Event())


def act(core: Core, job_id: str, change: Callable[[Session, Job], None]) -> Job:
    """As the API does it: on the locked row."""
    with core.transaction() as session:
        job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
        change(session, job)
    return read_job(core, job_id)


def lapse(core: Core, job_id: str) -> None:
    with core.transaction() as session:
        ledger.lapse(session.get_one(Job, job_id, with_for_update=True), session, core.settings.max_failures)


def test_of_sixteen_claims_one_wins(core: Core) -> None:
    for _ in range(5):
        job_id = add_job(core)
        barrier = threading.Barrier(16)

        def race(number: int, job_id: str = job_id, barrier: threading.Barrier = barrier) -> Job | None:
            barrier.wait()
            return take(core, job_id, f"worker {number}")

        with ThreadPoolExecutor(16) as pool:
            won = [job for job in pool.map(race, range(16)) if job is not None]
        assert len(won) == 1
        job = read_job(core, job_id)
        assert (job.status, job.attempt, job.worker) == ("running", 1, won[0].worker)
        assert types_of(core, job_id) == ["job.created", "job.started"]


@pytest.mark.parametrize("status", ["running", "paused", "succeeded", "failed", "cancelled"])
def test_only_a_queued_job_can_be_claimed(core: Core, status: str) -> None:
    job_id = add_job(core, status=status)
    assert take(core, job_id) is None
    assert read_job(core, job_id).attempt == 0


def test_a_claim_keeps_the_first_start_and_raises_the_attempt(core: Core) -> None:
    job_id = add_job(core)
    take(core, job_id)
    started = read_job(core, job_id).started_at
    lapse(core, job_id)
    job = take(core, job_id)
    assert job is not None
    assert (job.attempt, job.started_at) == (2, started)


def test_an_older_attempt_leaves_no_trace(core: Core) -> None:
    dataset_id = add_dataset(core)
    job_id = add_job(core, dataset_id=dataset_id)
    old = held(core, job_id)
    lapse(core, job_id)
    new = held(core, job_id)
    before = types_of(core, job_id)

    with pytest.raises(LeaseLost):
        old.event("log", "from the dead")
    with pytest.raises(LeaseLost):
        old.progress("working", 1, 2)
    with pytest.raises(LeaseLost), old.transaction() as session:
        session.add(image_row(core, dataset_id, "anna", 1))
    with pytest.raises(LeaseLost), old.transaction() as session:
        ledger.finish(session.get_one(Job, job_id), session, "succeeded")

    job = read_job(core, job_id)
    assert (job.status, job.attempt, job.progress) == ("running", 2, None)
    assert types_of(core, job_id) == before
    with core.transaction() as session:
        assert session.scalars(select(Image)).all() == []
    new.event("log", "from the living")
    assert types_of(core, job_id) == [*before, "log"]


def test_a_lease_lost_in_the_middle_of_a_transaction_undoes_it(core: Core) -> None:
    """The fence is a lock: whoever wants the job meanwhile waits, so nothing can slip in between check and commit."""
    job_id = add_job(core)
    claim = held(core, job_id)
    order: list[str] = []

    def reconciler() -> None:
        lapse(core, job_id)
        order.append("lapsed")

    other = threading.Thread(target=reconciler)
    with claim.transaction() as session:
        other.start()
        time.sleep(0.2)
        ledger.add_event(session, job_id, "log", "still mine")
        order.append("written")
    other.join()
    assert order == ["written", "lapsed"]
    assert types_of(core, job_id) == ["job.created", "job.started", "log", "job.requeued"]


def test_renewing_moves_the_lease_and_returns_the_flags(core: Core) -> None:
    job_id = add_job(core)
    take(core, job_id)
    first = read_job(core, job_id).lease_until
    with core.transaction() as session:
        assert ledger.renew(session, job_id, 1, 60) == ledger.Flags(cancel=False, pause=False)
    second = read_job(core, job_id).lease_until
    assert first is not None
    assert second is not None
    assert 25 < (second - first).total_seconds() < 40
    act(core, job_id, ledger.request_pause)
    act(core, job_id, ledger.request_cancel)
    with core.transaction() as session:
        assert ledger.renew(session, job_id, 1, 60) == ledger.Flags(cancel=True, pause=True)
        assert ledger.renew(session, job_id, 2, 60) is None, "another attempt's lease"
    change_job(core, job_id, status="queued")
    with core.transaction() as session:
        assert ledger.renew(session, job_id, 1, 60) is None, "the job was taken away"


def test_the_heartbeat_renews_and_brings_the_flags(core: Core) -> None:
    quick = Core(core.settings.model_copy(update={"lease_seconds": 0.4}), core.db, core.queue, core.store)
    job_id = add_job(core)
    with core.transaction() as session:
        job = ledger.claim(session, job_id, "caption", "w", 0.4)
    assert job is not None
    first = job.lease_until
    assert first is not None
    with Claim(quick, job, threading.Event()) as claim:
        wait_for(lambda: (read_job(core, job_id).lease_until or first) > first, 5)
        claim.check()
        act(core, job_id, ledger.request_cancel)
        wait_for(lambda: raises(claim, Cancelled), 5)
        change_job(core, job_id, attempt=9)
        wait_for(lambda: raises(claim, LeaseLost), 5)


def raises(claim: Claim, expected: type[Exception]) -> bool:
    try:
        claim.check()
    except Exception as error:
        return type(error) is expected
    return False


@pytest.mark.parametrize(
    ("flags", "stopping", "expected"),
    [
        ({"cancel_requested": True, "pause_requested": True}, True, Cancelled),
        ({"pause_requested": True}, True, Paused),
        ({}, True, HandedBack),
    ],
)
def test_what_a_check_raises(core: Core, flags: dict[str, Any], stopping: bool, expected: type[Exception]) -> None:
    claim = held(core, add_job(core, **flags))
    if stopping:
        claim._stopping.set()
    with pytest.raises(expected):
        claim.check()


def test_a_lapsed_job_is_retried_and_then_given_up_with_the_reason(core: Core) -> None:
    job_id = add_job(core)
    for failures in (1, 2):
        take(core, job_id)
        lapse(core, job_id)
        job = read_job(core, job_id)
        assert (job.status, job.failures, job.attempt, job.lease_until) == ("queued", failures, failures, None)
        assert events_of(core, job_id)[-1].level == "warning"
    take(core, job_id)
    lapse(core, job_id)
    job = read_job(core, job_id)
    assert (job.status, job.failures) == ("failed", 3)
    assert job.finished_at is not None
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert "3 times" in job.error["message"]
    assert types_of(core, job_id)[-1] == "job.failed"
    assert events_of(core, job_id)[-1].message == job.error["message"]


@pytest.mark.parametrize(
    ("flags", "status"), [({"cancel_requested": True}, "cancelled"), ({"pause_requested": True}, "paused")]
)
def test_a_lapsed_job_ends_as_the_user_asked(core: Core, flags: dict[str, bool], status: str) -> None:
    job_id = add_job(core)
    take(core, job_id)
    change_job(core, job_id, **flags)
    lapse(core, job_id)
    job = read_job(core, job_id)
    assert (job.status, job.cancel_requested, job.pause_requested) == (status, False, False)
    assert take(core, job_id) is None


def test_cancel_in_each_status(core: Core) -> None:
    for status in ("queued", "paused"):
        job_id = add_job(core, status=status)
        job = act(core, job_id, ledger.request_cancel)
        assert job.status == "cancelled"
        assert job.finished_at is not None
    running = add_job(core)
    take(core, running)
    assert act(core, running, ledger.request_cancel).status == "running"
    assert read_job(core, running).cancel_requested
    for status in FINAL:
        job_id = add_job(core, status=status)
        with pytest.raises(Conflict, match=status):
            act(core, job_id, ledger.request_cancel)
        assert read_job(core, job_id).status == status


def test_pause_and_resume_in_each_status(core: Core) -> None:
    queued = add_job(core)
    core.queue.redis.flushall()
    assert act(core, queued, ledger.request_pause).status == "paused"
    assert take(core, queued) is None
    assert act(core, queued, ledger.resume).status == "queued"
    assert core.queue.waiting("caption") == {queued}, "a resumed job is enqueued"

    running = add_job(core)
    take(core, running)
    assert act(core, running, ledger.request_pause).pause_requested
    resumed = act(core, running, ledger.resume)
    assert (resumed.status, resumed.pause_requested) == ("running", False), "the pause had not happened yet"

    for status in ("paused", *FINAL):
        with pytest.raises(Conflict):
            act(core, add_job(core, status=status), ledger.request_pause)
    for status in ("queued", "running", *FINAL):
        with pytest.raises(Conflict):
            act(core, add_job(core, status=status), ledger.resume)


def test_cancel_and_finish_at_once_end_in_one_final_state(core: Core) -> None:
    outcomes = set()
    for round in range(20):
        job_id = add_job(core)
        claim = held(core, job_id)
        barrier = threading.Barrier(2)

        def cancel(job_id: str = job_id, barrier: threading.Barrier = barrier) -> str:
            barrier.wait()
            time.sleep(random.random() * 0.003)
            try:
                act(core, job_id, ledger.request_cancel)
            except Conflict:
                return "refused"
            return "accepted"

        def finish(claim: Claim = claim, barrier: threading.Barrier = barrier, polite: bool = round % 2 == 0) -> None:
            barrier.wait()
            time.sleep(random.random() * 0.003)
            with claim.transaction() as session:
                job = session.get_one(Job, claim.id)
                ledger.finish(job, session, "cancelled" if polite and job.cancel_requested else "succeeded")

        with ThreadPoolExecutor(2) as pool:
            answer = pool.submit(cancel)
            pool.submit(finish).result()
        job = read_job(core, job_id)
        final = [type for type in types_of(core, job_id) if type.removeprefix("job.") in FINAL]
        assert final == [f"job.{job.status}"]
        assert not job.cancel_requested
        asked = "job.cancel_requested" in types_of(core, job_id)
        assert asked == (answer.result() == "accepted"), "the answer and the ledger disagree"
        assert job.status == "succeeded" or asked
        outcomes.add(answer.result())
    assert outcomes, "nothing raced"


def test_cancel_and_claim_at_once(core: Core) -> None:
    for _ in range(10):
        job_id = add_job(core)
        with ThreadPoolExecutor(2) as pool:
            claimed = pool.submit(take, core, job_id)
            pool.submit(act, core, job_id, ledger.request_cancel).result()
        job = read_job(core, job_id)
        if claimed.result() is None:
            assert (job.status, job.attempt) == ("cancelled", 0)
        else:
            assert (job.status, job.cancel_requested) == ("running", True)


def test_event_numbers_have_no_gap_when_many_write(core: Core) -> None:
    job_id = add_job(core)
    claim = held(core, job_id)

    def write(number: int) -> None:
        for i in range(5):
            try:
                with claim.transaction() as session:
                    ledger.add_event(session, job_id, "log", f"{number}.{i}")
                    if i == 2:
                        raise RuntimeError("a step that fails takes its event along")
            except RuntimeError:
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert types_of(core, job_id) == ["job.created", "job.started", *["log"] * 32]
    messages = {event.message for event in events_of(core, job_id)[2:]}
    assert messages == {f"{n}.{i}" for n in range(8) for i in range(5) if i != 2}


def test_progress_is_written_at_most_twice_a_second_and_always_at_the_end(core: Core) -> None:
    job_id = add_job(core)
    claim = held(core, job_id)
    claim.progress("captioning", 0, 100)
    claim.progress("captioning", 1, 100, flagged=3)
    progress = read_job(core, job_id).progress
    assert progress is not None
    assert progress["done"] == 0
    claim.progress("captioning", 100, 100, flagged=3)
    progress = read_job(core, job_id).progress
    assert progress is not None
    assert (progress["stage"], progress["done"], progress["total"], progress["flagged"]) == ("captioning", 100, 100, 3)
    assert progress["eta_seconds"] == 0.0


def test_a_worker_takes_only_its_own_kind(core: Core) -> None:
    job_id = add_job(core, "fine_tune")
    with core.transaction() as session:
        assert ledger.claim(session, job_id, "ingest", "w", LEASE) is None
    assert read_job(core, job_id).status == "queued"


@pytest.mark.parametrize("failed", [False, True])
def test_a_job_given_back_with_a_pause_pending_is_paused(core: Core, failed: bool) -> None:
    claim = held(core, add_job(core))
    act(core, claim.id, lambda session, job: ledger.request_pause(session, job))
    job = act(core, claim.id, lambda session, job: ledger.give_back(job, session, "stopping", failed=failed))
    assert (job.status, job.pause_requested, job.failures) == ("paused", False, int(failed))
    assert act(core, claim.id, lambda session, job: ledger.resume(session, job)).status == "queued"


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_job_that_ends_leaves_no_saved_state(core: Core, end: str) -> None:
    claim = held(core, add_job(core, "fine_tune"))
    core.store.put_bytes("training/state", b"weights")
    with claim.transaction() as session:
        session.add(
            Checkpoint(
                id="c", job_id=claim.id, kind="resume", step=1, epoch=1, storage_key="training/state", metrics={}
            )
        )
        session.add(Checkpoint(id="b", job_id=claim.id, kind="best", step=1, epoch=1, storage_key="kept", metrics={}))
    act(core, claim.id, lambda session, job: ledger.finish(job, session, end))
    assert not core.store.exists("training/state")
    with core.transaction() as session:
        assert session.scalars(select(Checkpoint.kind)).all() == ["best"]
