import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from shared.db.migrate import ADVISORY_LOCK, alembic_config, migrate
from shared.db.models import Base
from shared.db.session import Database
from tests.integration.conftest import ROOT
from tests.integration.support import DEAD_REDIS, Servers, wait_for


@pytest.fixture
def empty(servers: Servers) -> Iterator[Database]:
    """A database of its own, without a schema."""
    server = Database(servers.database_url)
    with server.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS migrating WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE migrating"))
    server.close()
    database = Database(servers.database_url.replace("/postgres?", "/migrating?"))
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def differences(database: Database) -> list[object]:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True, "compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def test_the_migrations_make_exactly_the_models(empty: Database) -> None:
    migrate(empty)
    assert tables(empty) == set(Base.metadata.tables)
    assert differences(empty) == []


def test_down_to_nothing_and_up_again(empty: Database) -> None:
    migrate(empty)
    with empty.engine.connect() as connection:
        command.downgrade(alembic_config(connection), "base")
        connection.commit()
    assert tables(empty) == set()
    migrate(empty)
    assert differences(empty) == []


def test_many_processes_may_migrate_at_once(empty: Database) -> None:
    """All wait for the one lock, held here until they do; then one migrates and the others find it done."""
    environment = os.environ | {
        "DATABASE_URL": str(empty.engine.url),
        "REDIS_URL": DEAD_REDIS,
        "STORAGE_URL": "file:///nonexistent",
        "CAPTUNE_BOOTSTRAP_KEY": "ck_first",
    }
    command = [sys.executable, "-m", "shared.db.migrate"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with empty.engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:k)"), {"k": ADVISORY_LOCK})
            connection.commit()
            processes += [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(3)]
            waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            wait_for(lambda: connection.scalar(waiting) == 3)
            assert tables(empty) == set()
            connection.execute(text("SELECT pg_advisory_unlock(:k)"), {"k": ADVISORY_LOCK})
            connection.commit()
        assert [process.wait(30) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert differences(empty) == []
    with empty.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1
        assert connection.execute(text("SELECT owner, name, scopes FROM api_keys")).all() == [
            ("admin", "bootstrap", ["read", "write", "admin"])
        ]


def test_a_status_that_does_not_exist_is_refused_by_the_database(empty: Database) -> None:
    migrate(empty)
    with pytest.raises(Exception, match="ck_jobs_status"), empty.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO jobs (id, kind, owner, status, request) VALUES ('a', 'caption', 'x', 'done', '{}')")
        )
