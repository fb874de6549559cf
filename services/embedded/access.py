"""The database and the store of a state directory, whether its stack runs or not."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.embedded import cluster
from services.embedded.servers import start_postgres
from shared.core import Core
from shared.errors import Conflict, NotFound
from shared.store.collector import CollectorSettings


@contextmanager
def reach(state_dir: Path, *, fresh: bool = False) -> Iterator[Core]:
    """Of the stack that runs there, or with a PostgreSQL started for the time. DATABASE_URL and STORAGE_URL mean what
    they do to `captune up`. fresh: make what is missing; else raises NotFound where there is nothing."""
    if not fresh and "DATABASE_URL" not in os.environ and not (state_dir / "postgres").is_dir():
        raise NotFound(f"{state_dir} holds no Captune data; name the directory with --state-dir", param="state_dir")
    with _database(state_dir) as url:
        given = {
            "DATABASE_URL": url,
            "REDIS_URL": os.environ.get("REDIS_URL", "unix:///nonexistent"),  # nothing is enqueued
            "STORAGE_URL": os.environ.get("STORAGE_URL", f"file://{state_dir.resolve() / 'store'}"),
        }
        core = Core.from_settings(CollectorSettings.model_validate(given), pool_size=2)
        try:
            yield core
        finally:
            core.close()


@contextmanager
def _database(state_dir: Path) -> Iterator[str]:
    if named := os.environ.get("DATABASE_URL"):
        yield named
        return
    try:
        server = start_postgres(state_dir)
    except Conflict as error:
        if error.code != "state_dir_in_use":
            raise
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:  # a socket's path must be short
            link = Path(folder) / "postgres"
            link.symlink_to(state_dir.resolve() / "postgres")
            yield f"postgresql+psycopg://{cluster.USER}@/postgres?host={link}"
        return
    try:
        yield server.url
    finally:
        server.stop()
