"""What can become of PostgreSQL: crashed, restarted, hanging up, locked, or refusing with the errors that only a server
gives. These are raised by a trigger function in the database, so they reach the code the way real ones do."""

import random
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.inject.base import End, Fault, nothing, send

if TYPE_CHECKING:
    from tests.faults.world import World

LONGEST = 6.0  # seconds that errors are raised: they end by themselves where nobody ends them

_PREPARE = """
CREATE SCHEMA faults;
CREATE TABLE faults.raised (sqlstate text NOT NULL, probability float8 NOT NULL, at_commit bool NOT NULL,
                            until timestamptz NOT NULL);
CREATE FUNCTION faults.raise_some() RETURNS trigger LANGUAGE plpgsql AS $body$
DECLARE chosen faults.raised;
BEGIN
    FOR chosen IN SELECT * FROM faults.raised WHERE at_commit = (TG_ARGV[0] = 'commit') LOOP
        IF random() < chosen.probability AND clock_timestamp() < chosen.until THEN
            RAISE EXCEPTION USING ERRCODE = chosen.sqlstate, MESSAGE = 'a fault was injected';
        END IF;
    END LOOP;
    RETURN NULL;
END $body$;
DO $body$
DECLARE name text;
BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version' LOOP
        EXECUTE format('CREATE TRIGGER faults AFTER INSERT OR UPDATE OR DELETE ON public.%I
                        FOR EACH STATEMENT EXECUTE FUNCTION faults.raise_some(''statement'')', name);
    END LOOP;
END $body$;
CREATE CONSTRAINT TRIGGER faults_at_commit AFTER INSERT OR UPDATE ON public.jobs DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION faults.raise_some('commit');
"""


def connect(world: "World") -> "psycopg.Connection[Any]":
    """Raises psycopg.OperationalError while there is no server."""
    url = world.database_url.replace("+psycopg", "")
    return psycopg.connect(url, autocommit=True, connect_timeout=2, options="-c statement_timeout=5000")


def patiently(world: "World", seconds: float = 10.0) -> "psycopg.Connection[Any] | None":
    """None where the server does not come back in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(psycopg.OperationalError):
            return connect(world)
        time.sleep(0.1)
    return None


def prepare(world: "World") -> None:
    """Sets the triggers, once for a database. Waits for whoever writes meanwhile."""
    with connect(world) as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(5)")
        made = connection.execute("SELECT to_regnamespace('faults') IS NOT NULL").fetchone()
        if made != (True,):
            connection.execute(_PREPARE)


def _raise(sqlstate: str, probability: float, name: str, *, at_commit: bool = False) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        with suppress(psycopg.OperationalError):  # another fault has the server
            prepare(world)
            with connect(world) as connection:
                connection.execute(
                    "INSERT INTO faults.raised VALUES (%s, %s, %s, clock_timestamp() + make_interval(secs => %s))",
                    (sqlstate, probability, at_commit, LONGEST),
                )
        return lambda: stop_raising(world)

    return Fault(name, "postgres", (1.0, LONGEST), begin)


def stop_raising(world: "World", seconds: float = 3.0) -> None:
    connection = patiently(world, seconds)
    if connection is not None:
        with suppress(psycopg.Error), connection:  # nothing was ever raised; or it goes away again
            connection.execute("DELETE FROM faults.raised")


def _kill_backend(world: "World", rng: random.Random) -> End:
    """The server ends all its sessions, recovers from its log, and goes on: what it does when a backend crashes."""
    with suppress(psycopg.OperationalError), connect(world) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
        if rows:
            send(rng.choice(rows)[0], signal.SIGKILL)
    return nothing


def _signal(number: signal.Signals, name: str) -> Fault:
    def begin(world: "World", rng: random.Random) -> End:
        send(world.pid("postgres"), number)
        return nothing

    return Fault(name, "postgres", (0, 0), begin)


def _hang_up(world: "World", rng: random.Random) -> End:
    with suppress(psycopg.OperationalError), connect(world) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    return nothing


def _lock(world: "World", rng: random.Random) -> End:
    """What a migration, a VACUUM FULL or a forgotten session does."""
    table = rng.choice(("jobs", "job_events", "captions", "images", "evaluations", "scores"))
    try:
        connection = connect(world)
    except psycopg.OperationalError:
        return nothing
    try:
        connection.execute("BEGIN")
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    except psycopg.Error:
        connection.close()
    return connection.close


FAULTS = [
    Fault("postgres_backend_killed", "postgres", (0, 0), _kill_backend),
    _signal(signal.SIGKILL, "postgres_killed"),
    _signal(signal.SIGINT, "postgres_restarted"),
    Fault("postgres_connections", "postgres", (0, 0), _hang_up),
    Fault("postgres_lock", "postgres", (0.5, 4.0), _lock),
    _raise("40001", 0.2, "postgres_serialization_failure"),
    _raise("40001", 0.3, "postgres_serialization_failure_at_commit", at_commit=True),
    _raise("40P01", 0.2, "postgres_deadlock"),
    _raise("53100", 1.0, "postgres_disk_full"),
]
