"""Rows past their retention: the part of collecting that needs no store."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, delete, func, literal_column, select, tuple_
from sqlalchemy.orm import Session

from shared.db.models import FINAL, IdempotencyKey, Job, JobEvent

JOBS = 200  # whose events go in one transaction
KEYS = 5000  # idempotency keys that do


def expire_events(session: Session, seconds: float, last: str, *, dry_run: bool) -> tuple[str | None, int, int]:
    """Of some jobs after `last` that ended so long ago: all of a job's events or none, so that no sequence gets a hole.
    -> (id of the last of these jobs, or None where there are no more; rows; bytes)"""
    jobs = select(Job.id).where(
        Job.id > last,
        Job.status.in_(FINAL),
        Job.finished_at < func.now() - timedelta(seconds=seconds),
        select(JobEvent).where(JobEvent.job_id == Job.id).exists(),
    )
    ids = session.scalars(jobs.order_by(Job.id).limit(JOBS)).all()
    if not ids:
        return None, 0, 0
    of_these = JobEvent.job_id.in_(ids)
    count, size = session.execute(_amount(JobEvent).where(of_these)).one()
    if not dry_run:
        session.execute(delete(JobEvent).where(of_these))
    return ids[-1], count, size


def expire_keys(session: Session, seconds: float, *, dry_run: bool) -> tuple[bool, int, int]:
    """Some idempotency keys of requests made so long ago; in a dry run all are counted at once.
    -> (whether there may be more; rows; bytes)"""
    old = IdempotencyKey.created_at < func.now() - timedelta(seconds=seconds)
    if dry_run:
        count, size = session.execute(_amount(IdempotencyKey).where(old)).one()
        return False, count, size
    some = select(IdempotencyKey.owner, IdempotencyKey.key).where(old).limit(KEYS)
    gone = delete(IdempotencyKey).where(tuple_(IdempotencyKey.owner, IdempotencyKey.key).in_(some))
    sizes: Sequence[int] = session.execute(gone.returning(_bytes(IdempotencyKey))).scalars().all()
    return len(sizes) == KEYS, len(sizes), sum(sizes)


def _amount(table: type[JobEvent] | type[IdempotencyKey]) -> Select[int, int]:
    return select(func.count(), func.coalesce(func.sum(_bytes(table)), 0)).select_from(table)


def _bytes(table: type[JobEvent] | type[IdempotencyKey]) -> ColumnElement[int]:
    return literal_column(f"pg_column_size({table.__tablename__}.*)")
