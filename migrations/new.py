"""`make migration m="what changed"`: compares the models with a fresh embedded database, writes the next revision."""

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory

from services.embedded.servers import start_postgres
from shared.db.migrate import alembic_config, migrate
from shared.db.session import Database


def main(message: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = start_postgres(Path(folder))
        try:
            database = Database(server.url)
            migrate(database)
            with database.engine.connect() as connection:
                config = alembic_config(connection)
                number = len(list(ScriptDirectory.from_config(config).walk_revisions())) + 1
                command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")
            database.close()
        finally:
            server.stop()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].strip():
        sys.exit('usage: make migration m="what changed"')
    main(sys.argv[1].strip())
