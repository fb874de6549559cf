"""Which rows name which objects of the store, and the two locks that keep objects from vanishing under those rows.

    blobs/ab/<sha256>                       images.sha256
    uploads/<ds_…>                          datasets.archive_key
    uploads/<cap_…>                         jobs.request["upload_key"], until the job is final
    training/<job>-<attempt>-<step>         checkpoints.storage_key
    classifiers/<job>/<attempt>[-last]      classifiers.storage_key, checkpoints.storage_key
    classifiers/<clf_…>/0                   classifiers.storage_key
    predictions/<job>-<attempt>.parquet     evaluations.predictions_key
    health/<hex>                            none: written and deleted by /readyz

An object is written first and named later, so for a while it looks like one that nobody needs. Two rules keep it, and
neither goes by a clock:

- What an attempt writes has the attempt in its key. Only a running job's attempt can commit a row (`ledger.fence`), so
  while a job runs, its attempt's keys count as named; afterwards no row can name them any more.
- For all else the transaction that names objects calls `keep` last: it holds COLLECTING shared up to its commit and has
  looked, under it, that they are there. Whoever deletes what no row names holds COLLECTING alone while it asks the
  rows and deletes. So either the rows are committed first and seen, or the deletion comes first and `keep` raises; the
  step is then repeated, and writes the objects again.

COPYING is held alone by whoever copies database and store (a backup), and shared by whoever deletes: what the copied
rows name stays until the copy is done."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.db.models import FINAL, Checkpoint, Classifier, Dataset, Evaluation, Image, Job
from shared.db.session import Database
from shared.errors import Conflict, Unavailable
from shared.store.storage import Store

COLLECTING, COPYING = 0x0CA9_C011, 0x0CA9_C097  # PostgreSQL advisory locks

# What a key of each folder looks like; `attempt` and `job` where an attempt wrote it.
FORMS = {
    "blobs": re.compile(r"blobs/[0-9a-f]{2}/[0-9a-f]{64}"),
    "uploads": re.compile(r"uploads/(ds|cap)_\w+"),
    "training": re.compile(r"training/(?P<job>\w+)-(?P<attempt>\d+)-\d+"),
    "classifiers": re.compile(r"classifiers/(?P<job>\w+)/(?P<attempt>\d+)(-last)?"),
    "predictions": re.compile(r"predictions/(?P<job>\w+)-(?P<attempt>\d+)\.parquet"),
    "health": re.compile(r"health/[0-9a-f]{32}"),
}


def keep(session: Session, store: Store, keys: Iterable[str]) -> None:
    """Call last in the transaction whose rows name these objects. Raises Unavailable where one of them is gone: write
    it again. Others may wait for this transaction, so it should end at once."""
    session.execute(select(func.pg_advisory_xact_lock_shared(COLLECTING)))
    if gone := store.missing(list(keys)):
        raise Unavailable(
            f"{len(gone)} stored files that nothing named yet were removed ({gone[0]} among them); trying again "
            "stores them again.",
            code="object_collected",
            retry_after=1,
        )


def may_delete(session: Session) -> bool:
    """Whether no copy is being made; none begins before this transaction has ended."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock_shared(COPYING))))


@contextmanager
def nothing_deleted(db: Database) -> Iterator[None]:
    """While inside, no object that a row has named vanishes from the store: what is of no more use is left to the
    collector, and that waits. Raises Conflict at the end where the connection, and the lock with it, was lost."""
    with db.engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(select(func.pg_advisory_lock(COPYING)))
        yield
        try:
            held = connection.scalar(select(func.pg_advisory_unlock(COPYING)))
        except DBAPIError:
            held = False
        if not held:
            raise Conflict("the database connection that held deletions back was lost; begin the copy again")


def named(session: Session, folder: str, keys: list[str], archives: timedelta | None = None) -> set[str]:
    """Those of the keys that a row names, or that a running attempt may yet name.

    archives: how long an uploaded archive is kept after its ingestion has ended; None: as long as its data set."""
    found = _of_running_attempts(session, folder, keys)  # first: what an attempt that ended since wrote is then seen
    for query in _queries(folder, keys, _kept(archives)):
        found |= set(session.scalars(query))
    return found


def every_key(session: Session) -> Iterator[str]:
    """Each object that the rows need, some more than once; streamed. An archive is needed until its ingestion ends."""
    for folder in FORMS:
        for query in _queries(folder, None, Job.status.not_in(FINAL)):
            yield from session.scalars(query.execution_options(yield_per=10_000))


def _of_running_attempts(session: Session, folder: str, keys: list[str]) -> set[str]:
    parsed = {key: match for key in keys if (match := FORMS[folder].fullmatch(key)) and "job" in match.groupdict()}
    if not parsed:
        return set()
    ids = {match["job"] for match in parsed.values()}
    query = select(Job.id, Job.attempt).where(Job.id.in_(ids), Job.status == "running")
    running = {(id, str(attempt)) for id, attempt in session.execute(query)}
    return {key for key, match in parsed.items() if (match["job"], match["attempt"]) in running}


def _queries(folder: str, keys: list[str] | None, archives: ColumnElement[bool]) -> list[Select[str]]:
    """Of the keys of a folder that rows name. keys: those alone. archives: which ingestions need theirs."""

    def column(name: InstrumentedAttribute[str]) -> Select[str]:
        return select(name) if keys is None else select(name).where(name.in_(keys))

    match folder:
        case "blobs":
            query = select(func.concat("blobs/", func.left(Image.sha256, 2), "/", Image.sha256)).distinct()
            digests = None if keys is None else [key.rpartition("/")[2] for key in keys]
            return [query if digests is None else query.where(Image.sha256.in_(digests))]
        case "uploads":
            query = column(Dataset.archive_key).join(Job, Job.id == Dataset.id).where(archives)
            sent = select(Job.request["upload_key"].astext).where(
                Job.kind == "caption", Job.status.not_in(FINAL), Job.request["upload_key"].astext.is_not(None)
            )
            return [query, sent]
        case "training":
            return [column(Checkpoint.storage_key)]
        case "classifiers":
            return [column(Classifier.storage_key), column(Checkpoint.storage_key)]
        case "predictions":
            return [column(Evaluation.predictions_key)]
        case _:
            return []


def _kept(archives: timedelta | None) -> ColumnElement[bool]:
    """Whether a data set's archive is kept: its ingestion may be repeated until the job is final."""
    if archives is None:
        return and_(True)
    return or_(Job.status.not_in(FINAL), Job.finished_at.is_(None), Job.finished_at >= func.now() - archives)
