"""A worker: one RQ process for one queue. `python -m shared.jobs.worker fine_tune`.

RQ's SimpleWorker runs the job in its own process, without a fork: torch, models and caches stay warm between jobs. A
killed worker is restarted by its supervisor, and its job comes back when the lease lapses."""

import importlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from rq.worker.base import WorkerStatus
from sqlalchemy.orm import Session

from shared import metrics, tracing
from shared.config import CoreSettings
from shared.core import Core
from shared.cpu import share_cores
from shared.db.models import Job
from shared.errors import CaptuneError, TooBusy, Unavailable
from shared.jobs import Cancelled, HandedBack, LeaseLost, Paused, ledger
from shared.jobs.claim import Claim
from shared.logging import configure, job_fields
from shared.metrics import ATTEMPTS, CLAIMED, LEASES_LOST
from shared.queue import KINDS, connect, ledger_id

log = logging.getLogger(__name__)

# A task does the work of one claimed job and returns what its last transaction writes: a function of the session that
# gives the job's result. It runs in the transaction that marks the job succeeded, so both stand or neither does.
Finish = Callable[[Session], dict[str, Any]]
Task = Callable[[Claim], Finish]

# Seconds, of a worker in Redis. RQ waits for a job for 15 s less, and for an answer of Redis for 5 s less: with its
# default of seven minutes, a connection that went dead without a word would keep the worker from its queue for as long.
WORKER_TTL = 20
RECONNECT_SECONDS = 1.0

LONGEST_WISH = 12  # of what an error says to wait, in first delays

TASKS = {
    "ingest": "services.captioner.ingest:ingest",
    "caption": "services.captioner.captioning.job:caption",
    "fine_tune": "services.trainer.tasks:fine_tune",
    "evaluate": "services.evaluator.tasks:evaluate",
}


def load_task(kind: str) -> Task:
    module, _, name = TASKS[kind].partition(":")
    task: Task = getattr(importlib.import_module(module), name)
    return task


class Runner:
    """Claims jobs of one kind, does them, and writes their next state."""

    def __init__(self, core: Core, kind: str, name: str) -> None:
        self.core, self.kind, self.name = core, kind, name
        self.stopping = threading.Event()

    def run(self, job_id: str) -> None:
        with self.core.transaction() as session:
            job = ledger.claim(session, job_id, self.kind, self.name, self.core.settings.lease_seconds)
            origin = ledger.origin(session, job_id) if job is not None else {}
        if job is None:
            log.info("nothing to claim", extra={"job_id": job_id})
            return
        context = {"job_id": job.id, "kind": job.kind, "attempt": job.attempt}
        with (
            job_fields(**context, request_id=origin.get("request_id")),
            tracing.job_span(self.kind, origin, context) as span,
            Claim(self.core, job, self.stopping) as claim,
        ):
            CLAIMED.labels(self.kind).inc()
            log.info("job claimed")
            began = time.perf_counter()
            try:
                outcome = self._work(claim)
            except LeaseLost:
                LEASES_LOST.labels(self.kind).inc()
                log.warning("lease lost, nothing more is written")
                outcome = "lease_lost"
            except Exception:  # the database is away: the lease lapses, and the reconciler queues the job again
                log.exception("how the attempt ended could not be written")
                outcome = "not_written"
            span.set_attribute("outcome", outcome)
            seconds = time.perf_counter() - began
            ATTEMPTS.labels(self.kind, outcome).observe(seconds)
            log.info("job left", extra={"outcome": outcome, "seconds": round(seconds, 2)})

    def _work(self, claim: Claim) -> str:
        """Returns the job's next state."""
        try:
            claim.check()
            finish = load_task(claim.kind)(claim)
            with claim.transaction() as session:
                job = session.get_one(Job, claim.id)
                ledger.finish(job, session, "succeeded", result=finish(session))
            return job.status
        except LeaseLost:
            raise
        except (Cancelled, Paused, HandedBack) as interrupt:
            with claim.transaction() as session:
                job = session.get_one(Job, claim.id)
                if isinstance(interrupt, Cancelled) or job.cancel_requested:
                    ledger.finish(job, session, "cancelled")
                elif isinstance(interrupt, Paused) and job.pause_requested:
                    ledger.pause(job, session)
                else:  # stopping, or resumed while it was being paused
                    ledger.give_back(job, session, "the attempt was interrupted; another one goes on")
            return job.status
        except (TooBusy, Unavailable) as error:
            return self._retry(claim, error)
        except CaptuneError as error:
            log.info("job failed", extra={"code": error.code})
            with claim.transaction() as session:
                job = session.get_one(Job, claim.id)
                ledger.finish(job, session, "failed", error=error)
            return job.status
        except Exception as error:
            log.exception("job raised")
            return self._retry(claim, _internal(error))

    def _retry(self, claim: Claim, error: CaptuneError) -> str:
        with claim.transaction() as session:
            job = session.get_one(Job, claim.id)
            if job.cancel_requested:
                ledger.finish(job, session, "cancelled")
            elif job.failures + 1 >= self.core.settings.max_failures:
                job.failures += 1
                ledger.finish(job, session, "failed", error=error)
            else:
                first = self.core.settings.retry_seconds
                delay = max(min(error.retry_after or 0.0, LONGEST_WISH * first), first * 4.0**job.failures)
                reason = f"attempt {job.attempt} failed: {error.message} Trying again in {delay:.0f} s."
                ledger.give_back(job, session, reason, delay_seconds=delay, failed=True)
        return job.status


def _internal(error: Exception) -> CaptuneError:
    return CaptuneError(f"unexpected {type(error).__name__} in the worker; its log has the details.")


class _Worker(SimpleWorker):
    """RQ's worker, with SIGTERM passed on to the running task."""

    runner: Runner
    max_connection_wait_time = 5.0  # seconds between attempts while Redis is away; RQ's own is a minute

    def handle_warm_shutdown_request(self) -> None:
        self.runner.stopping.set()

    def _shutdown(self) -> None:
        """RQ's also writes to Redis: in a signal handler, whose errors would be raised in the middle of the job."""
        if self.get_state() != WorkerStatus.BUSY:
            raise StopRequested
        self._stop_requested = True

    def subscribe(self) -> None:
        """To no commands: who can write to Redis must not stop workers. Jobs are cancelled in the ledger."""

    def unsubscribe(self) -> None:
        pass

    def check_for_suspension(self, burst: bool) -> None:
        """For the same reason, none is looked for."""


_PAYLOAD = {
    b"data": b'["captune.job", null, [], {}]',
    b"status": b"queued",
    b"timeout": b"-1",
    b"result_ttl": b"0",
    b"failure_ttl": b"60",
}


def _job_class(runner: Runner) -> type[RQJob]:
    """What RQ executes is fixed here. Whatever function, callback or webhook a payload in Redis names is ignored."""

    class LedgerJob(RQJob):
        success_callback = failure_callback = stopped_callback = None

        def refresh(self) -> None:
            """Of the payload itself nothing is read: it could be a bomb, or bring a time limit, retries, dependents."""
            if not self.connection.exists(self.key):
                raise NoSuchJobError(self.key)
            self.restore(_PAYLOAD)

        def _execute(self) -> None:
            runner.run(ledger_id(self.id))

        def send_webhooks(self, *_: Any, **__: Any) -> None:
            return None

    return LedgerJob


def main(kind: str) -> None:
    share_cores()
    settings = CoreSettings()
    configure(settings.log_level)
    tracing.configure(settings.otlp_endpoint, f"worker-{kind}")
    metrics.serve(settings.metrics_port)
    core = Core.from_settings(settings, pool_size=4)
    runner = Runner(core, kind, name=f"{socket.gethostname()}:{os.getpid()}")
    load_task(kind)  # now, not in the first job: no heartbeat gets through while torch is imported
    with suppress(StopRequested):  # SIGTERM while Redis is away
        while not runner.stopping.is_set():
            try:
                listen(runner, settings.redis_url.get_secret_value())
            except RedisError as error:
                log.warning("Redis is away, connecting again", extra={"error": str(error)})
            runner.stopping.wait(RECONNECT_SECONDS)
    core.close()


def listen(runner: Runner, redis_url: str, *, burst: bool = False) -> None:
    """Does the jobs of the runner's queue until SIGTERM, or an error of Redis that RQ does not go on from. burst: only
    until the queue is empty. On a connection of its own: RQ sets how long it may be silent."""
    redis, job_class = connect(redis_url), _job_class(runner)
    queue = Queue(runner.kind, connection=redis, serializer=JSONSerializer, job_class=job_class)
    worker = _Worker(
        [queue],
        connection=redis,
        serializer=JSONSerializer,
        job_class=job_class,
        log_job_description=False,
        worker_ttl=WORKER_TTL,
    )
    worker.runner = runner
    try:
        worker.work(burst=burst, logging_level="WARNING")
    finally:
        redis.close()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m shared.jobs.worker {{{'|'.join(KINDS)}}}")
    main(sys.argv[1])
