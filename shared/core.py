"""What every process holds: settings, database, queue, store; and the transaction that enqueues after its commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from sqlalchemy.orm import Session

from shared.config import CoreSettings
from shared.db.session import Database
from shared.queue import JobQueue, connect
from shared.storage import Store


@dataclass
class Core:
    settings: CoreSettings
    db: Database
    queue: JobQueue
    store: Store

    @classmethod
    def from_settings(cls, settings: CoreSettings, *, pool_size: int = 10) -> Self:
        return cls(
            settings=settings,
            db=Database(settings.database_url.get_secret_value(), pool_size),
            queue=JobQueue(connect(settings.redis_url.get_secret_value())),
            store=Store(settings.storage_url),
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One commit. After it, jobs that became `queued` inside it (`ledger.create`, `resume`) are enqueued, and the
        store keys in `session.info["obsolete"]` deleted."""
        with self.db.transaction() as session:
            yield session
        for kind, job_id in session.info.get("queued", ()):
            self.queue.enqueue(kind, job_id)
        for key in session.info.get("obsolete", ()):
            self.store.delete(key)

    def close(self) -> None:
        self.db.close()
        self.queue.redis.close()
