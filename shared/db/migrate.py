"""Bring the database to the newest revision: `python -m shared.db.migrate`.

Runs under a PostgreSQL advisory lock, so any number of processes may start at once."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from shared.config import CoreSettings
from shared.db.session import Database
from shared.logging import configure
from shared.web.auth import ensure_key

log = logging.getLogger(__name__)

ADVISORY_LOCK = 0x0CA9_704E


def alembic_config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).resolve().parents[2] / "migrations"))
    config.attributes["connection"] = connection
    return config


def migrate(database: Database) -> None:
    with database.engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:k)"), {"k": ADVISORY_LOCK})
        connection.commit()  # the lock is the session's, not the transaction's
        try:
            command.upgrade(alembic_config(connection), "head")
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:k)"), {"k": ADVISORY_LOCK})
            connection.commit()


def main() -> None:
    settings = CoreSettings()
    configure(settings.log_level)
    database = Database(settings.database_url.get_secret_value())
    migrate(database)
    if settings.bootstrap_key is not None:
        with database.transaction() as session:
            if not ensure_key(session, settings.bootstrap_key.get_secret_value(), owner="admin", name="bootstrap"):
                log.warning("CAPTUNE_BOOTSTRAP_KEY was revoked and stays so; set another if you need a new admin key")
    database.close()


if __name__ == "__main__":
    main()
