"""Every state change of a job, each one SQL statement or one locked row. Nothing here commits or talks to Redis."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared import tracing
from shared.db.models import FINAL, Checkpoint, Job, JobEvent
from shared.errors import CaptuneError, Conflict
from shared.jobs import LeaseLost


def create(
    session: Session, *, id: str, kind: str, owner: str, request: dict[str, Any], dataset_id: str | None = None
) -> Job:
    """A new queued job; `Core.transaction` enqueues it after the commit."""
    job = Job(id=id, kind=kind, owner=owner, request=request, dataset_id=dataset_id)
    session.add(job)
    session.flush()
    session.refresh(job)
    add_event(session, id, "job.created", "the job was accepted", tracing.origin() or None)
    _will_enqueue(session, job)
    return job


def claim(session: Session, job_id: str, kind: str, worker: str, lease_seconds: float) -> Job | None:
    """Take a queued job, raising its attempt number, or None where there is nothing to take: it is done, taken, not
    due, or of another kind than the worker's."""
    row = session.scalar(
        update(Job)
        .where(
            Job.id == job_id,
            Job.kind == kind,
            Job.status == "queued",
            func.coalesce(Job.run_after, func.now()) <= func.now(),
        )
        .values(
            status="running",
            attempt=Job.attempt + 1,
            worker=worker,
            lease_until=func.now() + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(Job.started_at, func.now()),
            run_after=None,
        )
        .returning(Job)
    )
    if row is not None:
        add_event(session, job_id, "job.started", f"attempt {row.attempt} started", {"attempt": row.attempt})
    return row


def origin(session: Session, job_id: str) -> dict[str, str]:
    """The request and the trace it was submitted in, which its first event keeps (`tracing.origin`)."""
    return session.scalar(select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.seq == 1)) or {}


@dataclass(frozen=True)
class Flags:
    cancel: bool
    pause: bool


def renew(session: Session, job_id: str, attempt: int, lease_seconds: float) -> Flags | None:
    """Renew the lease and read the flags, or None where another attempt owns the job."""
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.status == "running")
        .values(lease_until=func.now() + timedelta(seconds=lease_seconds))
        .returning(Job.cancel_requested, Job.pause_requested)
    ).one_or_none()
    return None if row is None else Flags(cancel=row[0], pause=row[1])


def fence(session: Session, job_id: str, attempt: int) -> Job:
    """Lock the row for the rest of the transaction. Raises LeaseLost unless this attempt still owns the job, so that
    whatever the transaction writes stands only if it does."""
    row = session.scalar(
        select(Job).where(Job.id == job_id, Job.attempt == attempt, Job.status == "running").with_for_update()
    )
    if row is None:
        raise LeaseLost(f"{job_id}: attempt {attempt} no longer owns the job")
    return row


def finish(job: Job, session: Session, status: str, *, result: Any = None, error: CaptuneError | None = None) -> None:
    """Final state of a fenced or locked row."""
    assert status in FINAL
    job.status, job.finished_at, job.lease_until = status, func.now(), None
    job.cancel_requested = job.pause_requested = False
    if result is not None:
        job.result = result
    if error is not None:
        job.error = {"code": error.code, "message": error.message, "param": error.param}
    drop_saved_states(session, job.id)
    if key := job.request.get("upload_key"):  # a file that was sent for this job alone
        session.info.setdefault("obsolete", []).append(key)
    message = error.message if error is not None else f"the job {status}"
    add_event(session, job.id, f"job.{status}", message, level="error" if status == "failed" else "info")


def drop_saved_states(session: Session, job_id: str) -> None:
    """Forget what the job saved to go on from; the files are deleted after the commit."""
    rows = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.kind == "resume")).all()
    for row in rows:
        session.delete(row)
    session.info.setdefault("obsolete", []).extend(row.storage_key for row in rows)
    session.flush()


def pause(job: Job, session: Session) -> None:
    job.status, job.lease_until, job.pause_requested = "paused", None, False
    add_event(session, job.id, "job.paused", "the job was paused")


def give_back(job: Job, session: Session, reason: str, *, delay_seconds: float = 0.0, failed: bool = False) -> None:
    """Queue the job again: after a stop, or (`failed`) after an error that may pass. A pause asked for meanwhile is
    honoured instead."""
    if job.pause_requested:
        job.failures += failed
        return pause(job, session)
    job.status, job.lease_until, job.queued_at = "queued", None, func.now()
    if failed:
        job.failures += 1
    if delay_seconds:
        job.run_after = func.now() + timedelta(seconds=delay_seconds)
    add_event(session, job.id, "job.requeued", reason, level="warning" if failed else "info")
    if not delay_seconds:
        _will_enqueue(session, job)


def lapse(job: Job, session: Session, max_failures: int) -> None:
    """A running job whose lease ran out (locked row): its worker died or hangs. Honour the user's flags, else retry
    within bounds."""
    if job.cancel_requested:
        finish(job, session, "cancelled")
    elif job.failures + 1 >= max_failures:
        job.failures += 1
        finish(job, session, "failed", error=worker_lost(job.failures))
    else:
        give_back(job, session, f"attempt {job.attempt} lost its worker; queued again", failed=True)


def worker_lost(times: int) -> CaptuneError:
    return CaptuneError(
        f"the worker died {times} times while doing this job, so it was given up; look at the worker's log for the "
        "reason (often: out of memory), then submit the job again",
        code="worker_lost",
    )


def request_cancel(session: Session, job: Job) -> None:
    """`job` is locked. A job no worker holds ends here; a running one ends at its next step."""
    if job.status in FINAL:
        raise Conflict(f"{job.id} has already {job.status}; there is nothing to cancel", code="job_is_final")
    if job.status == "running":
        job.cancel_requested = True
        add_event(session, job.id, "job.cancel_requested", "cancelling at the next step")
    else:
        finish(job, session, "cancelled")


def request_pause(session: Session, job: Job) -> None:
    if job.status in FINAL or job.status == "paused":
        raise Conflict(f"{job.id} is {job.status}; only a queued or running job can be paused", code="not_pausable")
    if job.status == "running":
        job.pause_requested = True
        add_event(session, job.id, "job.pause_requested", "pausing at the next step")
    else:
        pause(job, session)


def resume(session: Session, job: Job) -> None:
    if job.status == "running" and job.pause_requested:
        job.pause_requested = False  # the pause had not happened yet
        return
    if job.status != "paused":
        raise Conflict(f"{job.id} is {job.status}; only a paused job can be resumed", code="not_paused")
    give_back(job, session, "the job was resumed")


def add_event(
    session: Session,
    job_id: str,
    type: str,
    message: str,
    data: dict[str, Any] | None = None,
    level: str = "info",
) -> None:
    """Sequence numbers have no gap: the counter is the job's row, locked by this very update."""
    session.flush()
    seq = session.scalar(
        update(Job)
        .where(Job.id == job_id)
        .values(event_seq=Job.event_seq + 1)
        .returning(Job.event_seq)
        .execution_options(synchronize_session=False)
    )
    session.add(JobEvent(job_id=job_id, seq=seq, level=level, type=type, message=message, data=data))


def _will_enqueue(session: Session, job: Job) -> None:
    session.info.setdefault("queued", []).append((job.kind, job.id))
