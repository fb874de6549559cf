"""What a task holds while it works: the claimed row, a heartbeat that keeps the lease, and fenced writes."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from psycopg.errors import LockNotAvailable
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from shared.core import Core
from shared.db.models import Job
from shared.db.session import answered_within
from shared.jobs import Cancelled, HandedBack, LeaseLost, Paused, ledger

log = logging.getLogger(__name__)

JOIN_SECONDS = 2.0  # a heartbeat that hangs in the database is left behind: what it writes is fenced


class Claim:
    """`stopping` is set by the worker when it received SIGTERM."""

    def __init__(self, core: Core, job: Job, stopping: threading.Event) -> None:
        self.core = core
        self.id, self.kind, self.owner, self.attempt = job.id, job.kind, job.owner, job.attempt
        self.dataset_id = job.dataset_id
        self.request: dict[str, Any] = job.request
        self._stopping = stopping
        self._flags = ledger.Flags(cancel=job.cancel_requested, pause=job.pause_requested)
        self._renewed = time.monotonic()
        self._lost = threading.Event()
        self._done = threading.Event()
        self._progress_at = 0.0
        self._stage: tuple[str, float, int] | None = None  # name, monotonic start, done at start
        self._heartbeat = threading.Thread(target=self._beat, name=f"heartbeat-{job.id}", daemon=True)

    def __enter__(self) -> Self:
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._heartbeat.join(JOIN_SECONDS)

    def _beat(self) -> None:
        """Renew several times within a lease; flags arrive with the same statement."""
        lease = self.core.settings.lease_seconds
        pause = beat = min(1.0, lease / 4)
        while not self._done.wait(pause):
            pause = beat
            try:
                with answered_within(lease / 3), self.core.db.transaction() as session:
                    session.execute(select(func.set_config("lock_timeout", f"{round(250 * lease)}ms", True)))
                    flags = ledger.renew(session, self.id, self.attempt, lease)
            except SQLAlchemyError as error:  # the database may come back before the lease ends
                if isinstance(error, OperationalError) and isinstance(error.orig, LockNotAvailable):
                    # A long transaction of this attempt itself: as long as it holds the row, nobody takes the job.
                    self._renewed, pause = time.monotonic(), 0.0
                    continue
                log.warning("heartbeat failed", extra={"job_id": self.id, "error": str(error)})
                if time.monotonic() - self._renewed > lease:
                    self._lost.set()
                continue
            if flags is None:
                self._lost.set()
                return
            self._flags, self._renewed = flags, time.monotonic()

    def check(self) -> None:
        """Call at every step. Raises where the work must stop."""
        # A heartbeat that hangs in a database that does not answer says nothing. Two leases, not one: a process that
        # was stopped and goes on asks the database first whether the job is still its own.
        silent = time.monotonic() - self._renewed > 2 * self.core.settings.lease_seconds
        if self._lost.is_set() or silent:
            raise LeaseLost(f"{self.id}: attempt {self.attempt} lost its lease")
        if self._flags.cancel:
            raise Cancelled(self.id)
        if self._flags.pause:
            raise Paused(self.id)
        if self._stopping.is_set():
            raise HandedBack(self.id)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A transaction whose writes stand only if this attempt still owns the job."""
        with self.core.transaction() as session:
            ledger.fence(session, self.id, self.attempt)
            yield session

    def _report(self, write: Callable[[Session], None]) -> None:
        """Write what the work does not depend on: while the database is away it is skipped, and the heartbeat decides
        whether the job is lost."""
        try:
            with self.transaction() as session:
                write(session)
        except OperationalError as error:
            log.warning("a report was skipped", extra={"job_id": self.id, "error": str(error)})

    def advanced(self, session: Session) -> None:
        """This transaction keeps a step of the work: what failed before it counts no more."""
        session.get_one(Job, self.id).failures = 0

    def event(self, type: str, message: str, data: dict[str, Any] | None = None, level: str = "info") -> None:
        self._report(lambda session: ledger.add_event(session, self.id, type, message, data, level))

    def progress(self, stage: str, done: int, total: int, **extra: Any) -> None:
        """Record how far the job is; written at most twice a second. `eta_seconds` is for the stage."""
        now = time.monotonic()
        if self._stage is None or self._stage[0] != stage:
            self._stage, self._progress_at = (stage, now, done), 0.0
        if now - self._progress_at < 0.5 and done < total:
            return
        self._progress_at = now
        _, began, first = self._stage
        rate = (done - first) / (now - began) if now > began else 0.0
        eta = round((total - done) / rate, 1) if rate else None
        progress = {"stage": stage, "done": done, "total": total, "eta_seconds": eta, **extra}
        self._report(lambda session: setattr(session.get_one(Job, self.id), "progress", progress))
