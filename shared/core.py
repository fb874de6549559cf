"""What every process holds: settings, database, queue, store; and the transaction that enqueues after its commit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from sqlalchemy.orm import Session

from shared.config import CoreSettings
from shared.db.session import PING_SECONDS, WORKER_ANSWER_SECONDS, Database
from shared.queue import JobQueue, connect
from shared.store.opening import open_store
from shared.store.references import may_delete
from shared.store.storage import Store

log = logging.getLogger(__name__)


@dataclass
class Core:
    settings: CoreSettings
    db: Database
    queue: JobQueue
    store: Store

    @classmethod
    def from_settings(cls, settings: CoreSettings, *, pool_size: int = 10, api: bool = False) -> Self:
        """`api`: someone waits for each SQL statement, so that it is bounded; a worker's takes the time it needs."""
        statement = settings.statement_seconds if api else None
        answer = WORKER_ANSWER_SECONDS if statement is None else statement + PING_SECONDS
        url = settings.database_url.get_secret_value()
        return cls(
            settings=settings,
            db=Database(url, pool_size, statement_seconds=statement, answer_seconds=answer),
            queue=JobQueue(connect(settings.redis_url.get_secret_value())),
            store=open_store(settings.storage_url),
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One commit. After it, jobs that became `queued` inside it (`ledger.create`, `resume`) are enqueued, and the
        store keys in `session.info["obsolete"]` deleted."""
        with self.db.transaction() as session:
            yield session
        for kind, job_id in session.info.get("queued", ()):
            self.queue.enqueue(kind, job_id)
        if obsolete := session.info.get("obsolete"):
            self.discard(obsolete)

    def discard(self, keys: list[str]) -> None:
        """Deletes what no row names. What was committed stands, whatever happens here: the collector does the rest."""
        try:
            with self.db.transaction() as session:
                if may_delete(session):
                    self.store.delete(*keys)
        except Exception as error:
            log.warning("files of no more use were not deleted", extra={"keys": keys, "error": str(error)})

    def close(self) -> None:
        self.db.close()
        self.queue.redis.close()
