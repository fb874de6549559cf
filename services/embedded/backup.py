"""`captune backup` and `captune restore`: a folder with all that a stack must not lose.

    database.dump    pg_dump's custom format, of one moment
    store/           every object that rows of that moment name (and what was written since)
    manifest.json    rows of each table at that moment, objects, bytes; written last: without it the backup is not whole

Jobs go on while it is made. The database comes first, the store after it: an object is written before a row names it
and under a key that is used once, so what the dump names is there, and stays until the copy is done, since deletions
are held back for as long (`references.nothing_deleted`). Not in it: Redis (the ledger knows every job, the reconciler
queues them again), caches, logs, and `connection.json` (a restored stack makes a new local key; other keys go on)."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, make_url, text

from services.embedded import cluster
from services.embedded.access import reach
from shared.core import Core
from shared.db.migrate import migrate
from shared.errors import Conflict, InvalidInput, NotFound, Unavailable
from shared.store.check import check
from shared.store.references import nothing_deleted
from shared.store.storage import PART, Entry, Store

DUMP, STORE, MANIFEST = "database.dump", "store", "manifest.json"
Manifest = dict[str, Any]
Say = Callable[[str], None]


def backup(state_dir: Path, target: Path, say: Say) -> Manifest:
    """Raises Conflict for a `target` that is not empty, and where the database went away meanwhile, NotFound where
    there is nothing to back up."""
    _check_empty(target, "a backup is made in a folder of its own: name one that does not exist yet")
    with reach(state_dir) as core, nothing_deleted(core.db):
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        say("dumping the database")
        rows = _dump(core, target / DUMP)
        say("copying the store")
        objects, size = _copy_out(core.store, target / STORE, say)
    # Only here is it known that nothing was deleted meanwhile.
    manifest = {"made_at": time.time(), "rows": rows, "objects": objects, "bytes": size}
    os.sync()
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.sync()
    return manifest


def restore(source: Path, state_dir: Path, say: Say) -> Manifest:
    """Into a state directory that does not exist or is empty. Checks that every row is there, every object that a row
    names, and that pictures are what they were; raises Unavailable where not. The dump is SQL that runs as the
    database's owner: restore what you backed up yourself."""
    manifest = _manifest(source)
    _refuse_links(source)
    _check_empty(state_dir, "a backup is restored into an empty directory: name another with --state-dir")
    with reach(state_dir, fresh=True) as core:
        if inspect(core.db.engine).get_table_names():
            raise Conflict("the database is not empty; a backup is restored into an empty one")
        say("restoring the database")
        options = ["--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", str(source / DUMP)]
        _run(core, "pg_restore", *options)
        with core.db.engine.connect() as connection:
            found = _rows(connection)
        say("copying the store")
        for path in _files(source / STORE):
            with path.open("rb") as file:
                core.store.put_file(path.relative_to(source / STORE).as_posix(), file)
        say("checking what was restored")
        migrate(core.db)  # a backup may be of an earlier release
        damage = [f"{t}: {found.get(t)} rows, not {n}" for t, n in manifest["rows"].items() if found.get(t) != n]
        damage += list(check(core))
    if damage:
        raise Unavailable(
            f"the backup in {source} is damaged, and so is what was restored to {state_dir}: {'; '.join(damage[:10])}"
            + (f" and {len(damage) - 10} more" if len(damage) > 10 else ""),
            code="backup_damaged",
        )
    return manifest


def _check_empty(folder: Path, what_to_do: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is not empty; {what_to_do}", code="not_empty")


def _manifest(source: Path) -> Manifest:
    try:
        manifest: Manifest = json.loads((source / MANIFEST).read_text())
    except FileNotFoundError:
        why = "was not finished" if (source / DUMP).exists() else "is no backup"
        raise InvalidInput(f"{source} {why}: it has no {MANIFEST}", code="no_backup") from None
    return manifest


def _dump(core: Core, path: Path) -> dict[str, int]:
    """Dump and row counts of the same moment."""
    with core.db.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # a dump takes what it takes
        snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
        _run(core, "pg_dump", "--format=custom", "--no-owner", f"--snapshot={snapshot}", f"--file={path}")
        return _rows(connection)


def _rows(connection: Connection) -> dict[str, int]:
    """By table."""
    tables = sorted(inspect(connection).get_table_names())
    count = 'SELECT count(*) FROM "{}"'
    return {name: int(connection.scalar(text(count.format(name))) or 0) for name in tables}


def _run(core: Core, program: str, *arguments: str) -> None:
    """The password, where there is one, goes by the environment: arguments are for all to see."""
    url = make_url(core.settings.database_url.get_secret_value()).set(drivername="postgresql")
    plain = url.set(password=None).render_as_string(hide_password=False)
    environment = {**os.environ, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    command = [str(cluster.find_programs(None, None) / program), f"--dbname={plain}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{program} failed: {done.stderr.strip()[-2000:]}", code="backup_failed")


def _copy_out(store: Store, target: Path, say: Say) -> tuple[int, int]:
    count = size = 0
    said = time.monotonic()
    for entry in _objects(store, ""):
        path = target / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with store.local_file(entry.key) as found:
                shutil.copyfile(found, path)
        except (NotFound, FileNotFoundError):  # no row names it: those that are named stay
            path.unlink(missing_ok=True)
            continue
        count, size = count + 1, size + path.stat().st_size
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"copying the store: {count:,} objects, {size:,} bytes")
    return count, size


def _objects(store: Store, folder: str) -> Iterator[Entry]:
    for entry in store.entries(folder):
        if entry.key.endswith(PART) or entry.key == "health":
            continue
        if entry.folder:
            yield from _objects(store, entry.key)
        else:
            yield entry


def _refuse_links(source: Path) -> None:
    """A backup has none; one that somebody put there would bring in a file of this machine."""
    if link := next((path for path in source.rglob("*") if path.is_symlink()), None):
        raise InvalidInput(f"{link} is a link, and a backup has none: this one was altered", code="backup_altered")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
