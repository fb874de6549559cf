"""Makes the ledger's promise good whatever Redis or a worker lost: `python -m shared.jobs.reconciler`.

A process of its own, never inside a busy worker. Any number may run: every change locks its row."""

import logging
import signal
import threading
from datetime import timedelta

from redis import RedisError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from shared import metrics, tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.db.models import Job
from shared.jobs import ledger
from shared.logging import configure
from shared.metrics import RECONCILED
from shared.queue import KINDS

log = logging.getLogger(__name__)
BATCH = 200


def recover_lapsed(core: Core) -> int:
    """Running jobs whose lease ran out are queued again, or failed for good after `max_failures`."""
    with core.transaction() as session:
        rows = session.scalars(
            select(Job)
            .where(Job.status == "running", Job.lease_until < func.now())
            .limit(BATCH)
            .with_for_update(skip_locked=True)
        ).all()
        for job in rows:
            ledger.lapse(job, session, core.settings.max_failures)
            RECONCILED.labels("lapsed", job.kind).inc()
            log.warning("lease lapsed", extra={"job_id": job.id, "attempt": job.attempt, "status": job.status})
    return len(rows)


def mend_queue(core: Core) -> None:
    if wrong := core.queue.mend():
        log.error("keys of RQ's were of another type and were deleted: who writes to Redis?", extra={"keys": wrong})


def requeue_forgotten(core: Core) -> int:
    """Queued jobs that are due but not on Redis's list are enqueued again. Twice does no harm: one claim wins."""
    count = 0
    for kind in KINDS:
        with core.db.transaction() as session:
            due = session.scalars(
                select(Job.id)
                .where(
                    Job.kind == kind,
                    Job.status == "queued",
                    Job.queued_at < func.now() - timedelta(seconds=core.settings.requeue_after_seconds),
                    func.coalesce(Job.run_after, func.now()) <= func.now(),
                )
                .order_by(Job.queued_at)
            ).all()
        if not due:
            continue
        known = core.queue.waiting(kind)
        for job_id in due:
            if job_id not in known:
                count += core.queue.enqueue(kind, job_id)
                RECONCILED.labels("enqueued", kind).inc()
                log.info("enqueued again", extra={"job_id": job_id})
    return count


def main() -> None:
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, "reconciler")
    metrics.serve(settings.metrics_port)
    core = Core.from_settings(settings, pool_size=2)
    stop = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: stop.set())
    while not stop.wait(settings.reconcile_seconds):
        try:
            recover_lapsed(core)
            mend_queue(core)
            requeue_forgotten(core)
        except (SQLAlchemyError, RedisError) as error:
            log.warning("reconciling failed, trying again", extra={"error": str(error)})
    core.close()


if __name__ == "__main__":
    main()
