"""The connection pool and the transaction: one per request or step. Nothing here waits for ever, whatever becomes of
the server, the network between or this process:

- a server that is gone is noticed by TCP, one that is frozen or behind a silent proxy by `answer_seconds`;
- a process that is gone or frozen loses its locks: the server ends its session."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

T = TypeVar("T")

CONNECT_SECONDS = 5
PING_SECONDS = 5.0  # for the answer to the ping that each transaction on a pooled connection begins with
POOL_SECONDS = 10.0  # for another request to give a connection back
IDLE_SECONDS = 900  # within a transaction: the collector deletes hundreds of objects of a slow store inside one
WORKER_ANSWER_SECONDS = 900.0  # of a worker's statements, of which some go through all captions of a data set
# Either end takes the other for gone after 30 s of silence. (Unix sockets know none of this and need none.)
CLIENT_TCP = {"keepalives_idle": "15", "keepalives_interval": "5", "keepalives_count": "3", "tcp_user_timeout": "30000"}
SERVER_TCP = {"tcp_keepalives_idle": 15, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}

_within: ContextVar[float | None] = ContextVar("_within", default=None)


@contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Whatever this thread asks of a database in the block is answered in time, or raises OperationalError. Of two
    blocks in one another the shorter time holds."""
    outer = _within.get()
    token = _within.set(seconds if outer is None else min(seconds, outer))
    try:
        yield
    finally:
        _within.reset(token)


class _Connection(psycopg.Connection[Any]):
    """A psycopg connection whose every wait for the server has an end."""

    answer_seconds: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        bounds = [each for each in (timeout, self.answer_seconds, _within.get()) if each is not None]
        try:
            return super().wait(gen, interval, min(bounds, default=None))
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:  # given up in the midst of an answer
                self.pgconn.finish()
            raise


class Database:
    """`url` is a SQLAlchemy URL (`postgresql+psycopg://…`); plain `postgres://` and `postgresql://` are accepted.

    statement_seconds: the server ends a statement that takes longer
    answer_seconds: the connection is given up when an answer takes longer
    Both unbounded by default, as a migration needs it."""

    def __init__(
        self,
        url: str,
        pool_size: int = 10,
        *,
        statement_seconds: float | None = None,
        answer_seconds: float | None = None,
    ) -> None:
        scheme, _, rest = url.partition("://")
        if scheme in ("postgres", "postgresql"):
            url = f"postgresql+psycopg://{rest}"
        given = make_url(url).query
        session = {**SERVER_TCP, "idle_in_transaction_session_timeout": 1000 * IDLE_SECONDS}
        if statement_seconds is not None:
            session["statement_timeout"] = round(1000 * statement_seconds)
        options = " ".join(f"-c {name}={value}" for name, value in session.items())
        arguments = {"connect_timeout": str(CONNECT_SECONDS), **CLIENT_TCP}
        arguments = {name: value for name, value in arguments.items() if name not in given}
        arguments["options"] = f"{options} {given.get('options', '')}".rstrip()  # what the operator says comes last
        self.engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=10,
            pool_timeout=POOL_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,  # of an error's text, which is logged: they hold users' texts and keys' hashes
            connect_args=arguments,
        )
        # Of the same pool.
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._snapshot = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

        @event.listens_for(self.engine, "do_connect")
        def connect(_dialect: Any, _record: Any, positional: Any, named: Any) -> _Connection:
            if (within := _within.get()) is not None:  # whole seconds, and no fewer than 2: libpq's rule
                named["connect_timeout"] = str(max(2, min(int(named["connect_timeout"]), math.ceil(within))))
            connection = _Connection.connect(*positional, **named)
            connection.answer_seconds = answer_seconds
            return connection

        @event.listens_for(self.engine, "handle_error")
        def ended(context: ExceptionContext) -> None:
            """psycopg counts it among internal errors; to who asked, the database does not answer."""
            found = context.original_exception
            if isinstance(found, psycopg.errors.IdleInTransactionSessionTimeout):
                raise OperationalError(context.statement, None, found, hide_parameters=True) from found

        ping = self.engine.dialect.do_ping

        def bounded_ping(connection: Any) -> bool:
            with answered_within(PING_SECONDS):
                return ping(connection)

        self.engine.dialect.do_ping = bounded_ping  # type: ignore[method-assign, assignment]

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commits when the block ends, rolls back when it raises. OperationalError where the database does not answer,
        or no connection came free in time."""
        with self._session(self.engine) as session:
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """For reading alone. All statements see one moment: what the first found is there for the next, though it may
        be deleted meanwhile. Raises as `transaction`."""
        with self._session(self._snapshot) as session:
            yield session

    @contextmanager
    def _session(self, engine: Engine) -> Iterator[Session]:
        try:
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session
        except PoolTimeout as error:
            raise OperationalError("waiting for a connection of the pool", None, error) from error

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """For statements that each stand alone: a single one is one round trip, and three within a transaction."""
        try:
            with self._autocommit.connect() as connection:
                yield connection
        except PoolTimeout as error:
            raise OperationalError("waiting for a connection of the pool", None, error) from error

    def close(self) -> None:
        self.engine.dispose()

    def check(self) -> None:
        """Raises where the database does not answer."""
        with answered_within(PING_SECONDS), self.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
