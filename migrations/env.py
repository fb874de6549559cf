"""Alembic's environment: the connection comes from shared/db/migrate.py, or from DATABASE_URL for developers."""

from alembic import context

from shared.config import CoreSettings
from shared.db.models import Base
from shared.db.session import Database


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is None:
        settings = CoreSettings()  # type: ignore[call-arg]  # read from the environment
        connection = Database(settings.database_url.get_secret_value()).engine.connect()
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


run()
