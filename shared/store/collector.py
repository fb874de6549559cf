"""Removes what nothing needs any more: objects of the store that no row names, and rows past their retention.

    python -m shared.store.collector             at once, then every day, until SIGTERM
    python -m shared.store.collector once        one run: for cron
    python -m shared.store.collector dry-run     says what a run would remove
    python -m shared.store.collector check       says what rows name and the store lacks; reads every picture
    python -m shared.store.collector hold        until SIGTERM nothing that rows name is deleted: for a backup by hand

Why nothing that is needed goes: an object goes only if it is older than `Retention.unreferenced` and no row names it.
The age alone would do where every step that stores something names it within a day. Nobody can promise that (a laptop
sleeps for a week between the two; `put_blob` finds the bytes there already), so it is there to save work, and the locks
of shared/store/references.py make it safe: rows are asked again, and the objects deleted, while nobody can commit a row
that names them; and who comes later finds them gone and stores them again. Ages are by the store's own clock. What does
not look like a key of ours is reported and left alone.

Memory is bounded: folders are streamed and rows asked for BATCH keys at a time. Any number of collectors may be
started; one works."""

import argparse
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, Field
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from shared.config import CoreSettings
from shared.core import Core
from shared.errors import CaptuneError, Conflict
from shared.logging import configure
from shared.store.check import check
from shared.store.collected import DAY, EVENTS, KEYS, UNFINISHED, Collected, Retention
from shared.store.expiry import expire_events, expire_keys
from shared.store.references import COLLECTING, FORMS, may_delete, named, nothing_deleted
from shared.store.storage import PART, Entry

__all__ = ["Collected", "Retention", "collect"]

log = logging.getLogger(__name__)

BATCH = 500  # keys asked for, and deleted, in one transaction
LOCK = "5s"  # patience with transactions that name objects; they wait behind us for as long
REPORT_SECONDS = 30.0  # between lines of the log
ALONE = 0x0CA9_C0A1  # PostgreSQL advisory lock: one collector at a time
_NESTED = ("blobs", "classifiers")  # folders of folders


def collect(
    core: Core, retention: Retention, dry_run: bool = False, stopped: Callable[[], bool] = lambda: False
) -> Collected:
    """One run. `stopped` is asked between steps of at most a few seconds. Raises Conflict while another collector
    works, or a backup is being made; what was removed before stays so."""
    run = _Run(core, retention, dry_run, stopped)
    with _alone(core):
        run.rows()
        run.objects()
    run.report("collected", final=True)
    return run.found


class _Run:
    def __init__(self, core: Core, retention: Retention, dry_run: bool, stopped: Callable[[], bool]) -> None:
        self.core, self.retention, self.dry_run, self.stopped = core, retention, dry_run, stopped
        self.found = Collected(dry_run)
        self.seen = 0
        self.reported = time.monotonic()

    def goes_on(self) -> bool:
        if self.stopped():
            self.found.complete = False
        return self.found.complete

    def report(self, message: str, *, final: bool = False, **extra: object) -> None:
        if not final and time.monotonic() - self.reported < REPORT_SECONDS:
            return
        self.reported = time.monotonic()
        amounts = {kind: [each.number, each.bytes] for kind, each in self.found.removed.items() if each.number}
        log.info(message, extra={"dry_run": self.dry_run, "seen": self.seen, "removed": amounts, **extra})

    def rows(self) -> None:
        last: str | None = ""
        while last is not None and self.goes_on():
            with self.core.db.transaction() as session:
                last, count, size = expire_events(session, self.retention.events, last, dry_run=self.dry_run)
            self.found.add(EVENTS, count, size)
            self.report("collecting", stage=EVENTS)
        more = True
        while more and self.goes_on():
            with self.core.db.transaction() as session:
                more, count, size = expire_keys(session, self.retention.idempotency_keys, dry_run=self.dry_run)
            self.found.add(KEYS, count, size)

    def objects(self) -> None:
        store = self.core.store
        self.limit = store.now() - self.retention.unreferenced
        for top in store.entries():
            if not self.goes_on():
                return
            if top.folder and top.key in FORMS:
                self._folder(top.key)
            else:
                self._odd(top)

    def _folder(self, folder: str) -> None:
        batch: list[Entry] = []
        for entry in self._units(folder):
            self.seen += 1
            if not FORMS[folder].fullmatch(entry.key):
                self._odd(entry)
            elif entry.modified < self.limit:
                batch.append(entry)
            if len(batch) == BATCH:
                self._objects(folder, batch)
                batch = []
            if self.seen % BATCH == 0:
                self.report("collecting", stage=folder)
                if not self.goes_on():
                    return
        self._objects(folder, batch)

    def _units(self, folder: str) -> Iterator[Entry]:
        store = self.core.store
        for entry in store.entries(folder):
            if folder not in _NESTED or not entry.folder or entry.key.endswith(PART):
                yield entry
                continue
            yield from store.entries(entry.key)
            if folder == "classifiers" and entry.modified < self.limit and not self.dry_run:
                store.drop_empty(entry.key)

    def _odd(self, entry: Entry) -> None:
        if not entry.key.endswith(PART):
            return self.found.add_unknown(entry.key)
        whole = self.core.store.measure(entry)
        if whole.modified < self.limit:
            self._remove(UNFINISHED, [whole])

    def _objects(self, folder: str, batch: list[Entry]) -> None:
        """Of old objects those that no row names. Most are named: only the rest is looked at closely, and locked."""
        with self.core.db.transaction() as session:
            lost = self._unnamed(session, folder, batch)
        lost = [each for each in map(self.core.store.measure, lost) if each.modified < self.limit]
        if self.dry_run or not lost:
            return self._remove(folder, lost)
        try:
            with self.core.db.transaction() as session:
                session.execute(select(func.set_config("lock_timeout", LOCK, True)))
                if not may_delete(session):
                    raise Conflict("a backup is being made, nothing is removed now; try again later", code="backup")
                session.execute(select(func.pg_advisory_xact_lock(COLLECTING)))
                self._remove(folder, self._unnamed(session, folder, lost))
        except OperationalError as error:
            log.info("objects left for the next run", extra={"folder": folder, "error": str(error.orig)})
            self.found.postponed += len(lost)

    def _unnamed(self, session: Session, folder: str, entries: list[Entry]) -> list[Entry]:
        archives = self.retention.archives
        keys = [each.key for each in entries]
        known = named(session, folder, keys, None if archives is None else timedelta(seconds=archives))
        return [each for each in entries if each.key not in known]

    def _remove(self, kind: str, entries: list[Entry]) -> None:
        store = self.core.store
        for start in range(0, len(entries), store.deletes_at_once):
            part = entries[start : start + store.deletes_at_once]
            try:
                if not self.dry_run:
                    store.delete(*(each.key for each in part))
                self.found.add(kind, len(part), sum(each.bytes for each in part))
            except OSError as error:
                log.warning("not removed", extra={"key": part[0].key, "error": str(error)})
                self.found.postponed += len(part)


@contextmanager
def _alone(core: Core) -> Iterator[None]:
    with core.db.engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        if not connection.scalar(select(func.pg_try_advisory_lock(ALONE))):
            raise Conflict("another collector is at work; wait until it is done", code="collector_running")
        try:
            yield
        finally:
            if not connection.invalidated:
                connection.execute(select(func.pg_advisory_unlock(ALONE)))


class CollectorSettings(CoreSettings):
    """`Retention` as settings."""

    collect_every_seconds: float = Field(default=DAY, gt=0)
    keep_unreferenced_seconds: float = Field(default=Retention.unreferenced, ge=3600)
    keep_events_seconds: float = Field(default=Retention.events, ge=DAY)
    keep_idempotency_keys_seconds: float = Field(default=Retention.idempotency_keys, ge=DAY)
    keep_archives_seconds: Annotated[float | None, BeforeValidator(lambda value: None if value == "off" else value)] = (
        Field(default=Retention.archives, ge=0)
    )

    @property
    def retention(self) -> Retention:
        return Retention(
            unreferenced=self.keep_unreferenced_seconds,
            events=self.keep_events_seconds,
            idempotency_keys=self.keep_idempotency_keys_seconds,
            archives=self.keep_archives_seconds,
        )


def _daily(core: Core, settings: CollectorSettings, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            collect(core, settings.retention, stopped=stop.is_set)
        except CaptuneError as error:
            log.warning("not collected: %s", error.message)
        except Exception:  # an outage of the database or the store, whose errors have no common kind
            log.exception("collecting failed, trying again at the next turn")
        stop.wait(settings.collect_every_seconds)


def _check(core: Core) -> int:
    found = 0
    for problem in check(core):
        found += 1
        print(problem)
    print(f"{found} objects are missing or damaged" if found else "every object that a row names is there and whole")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.store.collector", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", default="daily", choices=("daily", "once", "dry-run", "check", "hold"))
    what = parser.parse_args(argv).what
    settings = CollectorSettings()
    configure(settings.log_level)
    core = Core.from_settings(settings, pool_size=2)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        match what:
            case "daily":
                _daily(core, settings, stop)
            case "check":
                return _check(core)
            case "hold":
                with nothing_deleted(core.db):
                    print("held: nothing that a row names is deleted until this process ends", flush=True)
                    stop.wait()
            case _:
                print(collect(core, settings.retention, what == "dry-run", stop.is_set).table())
    except CaptuneError as error:
        print(f"collector: {error.message}")
        return 1
    finally:
        core.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
