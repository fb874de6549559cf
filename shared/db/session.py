"""The connection pool and the transaction: one per request or step."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session


class Database:
    """`url` is a SQLAlchemy URL (`postgresql+psycopg://…`); plain `postgres://` and `postgresql://` are accepted."""

    def __init__(self, url: str, pool_size: int = 10) -> None:
        scheme, _, rest = url.partition("://")
        if scheme in ("postgres", "postgresql"):
            url = f"postgresql+psycopg://{rest}"
        self.engine = create_engine(url, pool_size=pool_size, max_overflow=10, pool_pre_ping=True)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commits when the block ends, rolls back when it raises."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    def check(self) -> None:
        """Raises where the database does not answer."""
        with self.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
