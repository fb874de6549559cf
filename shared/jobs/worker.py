"""A worker: one RQ process for one queue. `python -m shared.jobs.worker fine_tune`.

RQ's SimpleWorker runs the job in its own process, without a fork: torch, models and caches stay warm between jobs. A
killed worker is restarted by its supervisor, and its job comes back when the lease lapses."""

import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from rq import Queue, SimpleWorker
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from sqlalchemy.orm import Session

from shared.config import CoreSettings
from shared.core import Core
from shared.cpu import share_cores
from shared.db.models import Job
from shared.errors import CaptuneError, TooBusy, Unavailable
from shared.jobs import Cancelled, HandedBack, LeaseLost, Paused, ledger
from shared.jobs.claim import Claim
from shared.logging import configure
from shared.queue import KINDS, ledger_id

log = logging.getLogger(__name__)

# A task does the work of one claimed job and returns what its last transaction writes: a function of the session that
# gives the job's result. It runs in the transaction that marks the job succeeded, so both stand or neither does.
Finish = Callable[[Session], dict[str, Any]]
Task = Callable[[Claim], Finish]

FIRST_DELAY = 5.0  # seconds before a failed attempt is repeated; four times as long after each further failure

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
        if job is None:
            log.info("nothing to claim", extra={"job_id": job_id})
            return
        context = {"job_id": job.id, "kind": job.kind, "attempt": job.attempt}
        log.info("job claimed", extra=context)
        with Claim(self.core, job, self.stopping) as claim:
            try:
                self._work(claim)
            except LeaseLost:
                log.warning("lease lost, nothing more is written", extra=context)
                return
        log.info("job left", extra=context)

    def _work(self, claim: Claim) -> None:
        try:
            claim.check()
            finish = load_task(claim.kind)(claim)
            with claim.transaction() as session:
                job = session.get_one(Job, claim.id)
                ledger.finish(job, session, "succeeded", result=finish(session))
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
        except (TooBusy, Unavailable) as error:
            self._retry(claim, error)
        except CaptuneError as error:
            log.info("job failed", extra={"job_id": claim.id, "code": error.code})
            with claim.transaction() as session:
                ledger.finish(session.get_one(Job, claim.id), session, "failed", error=error)
        except Exception as error:
            log.exception("job raised", extra={"job_id": claim.id, "attempt": claim.attempt})
            self._retry(claim, _internal(error))

    def _retry(self, claim: Claim, error: CaptuneError) -> None:
        with claim.transaction() as session:
            job = session.get_one(Job, claim.id)
            if job.cancel_requested:
                ledger.finish(job, session, "cancelled")
            elif job.failures + 1 >= self.core.settings.max_failures:
                job.failures += 1
                ledger.finish(job, session, "failed", error=error)
            else:
                delay = max(float(error.retry_after or 0), FIRST_DELAY * 4.0**job.failures)
                reason = f"attempt {job.attempt} failed: {error.message} Trying again in {delay:.0f} s."
                ledger.give_back(job, session, reason, delay_seconds=delay, failed=True)


def _internal(error: Exception) -> CaptuneError:
    return CaptuneError(f"unexpected {type(error).__name__} in the worker; its log has the details.")


class _Worker(SimpleWorker):
    """RQ's worker, with SIGTERM passed on to the running task."""

    runner: Runner

    def handle_warm_shutdown_request(self) -> None:
        self.runner.stopping.set()


def _job_class(runner: Runner) -> type[RQJob]:
    """What RQ executes is fixed here. Whatever function, callback or webhook a payload in Redis names is ignored."""

    class LedgerJob(RQJob):
        success_callback = failure_callback = stopped_callback = None

        def _execute(self) -> None:
            runner.run(ledger_id(self.id))

        def send_webhooks(self, *_: Any, **__: Any) -> None:
            return None

    return LedgerJob


def main(kind: str) -> None:
    share_cores()
    settings = CoreSettings()
    configure(settings.log_level)
    core = Core.from_settings(settings, pool_size=4)
    runner = Runner(core, kind, name=f"{socket.gethostname()}:{os.getpid()}")
    job_class = _job_class(runner)
    queue = Queue(kind, connection=core.queue.redis, serializer=JSONSerializer, job_class=job_class)
    worker = _Worker(
        [queue], connection=core.queue.redis, serializer=JSONSerializer, job_class=job_class, log_job_description=False
    )
    worker.runner = runner
    worker.work(logging_level="WARNING")
    core.close()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python -m shared.jobs.worker {{{'|'.join(KINDS)}}}")
    main(sys.argv[1])
