"""What grows with the number of files in an upload, on disk instead of in memory. SQLite's nameless database is a
temporary file that nobody else sees; a few MiB of it are cached, and it is gone with the object. For one thread at a
time."""

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])
_CACHE: Final = 8 * 1024  # KiB


class Names(Collection[str]):
    """Distinct names in the order they were added."""

    def __init__(self) -> None:
        self._db = _database()

    def add(self, name: str) -> bool:
        """Whether it is new."""
        return self._db.execute("INSERT OR IGNORE INTO known (name) VALUES (?)", (name,)).rowcount > 0

    def __contains__(self, name: object) -> bool:
        return self._db.execute("SELECT 1 FROM known WHERE name = ?", (name,)).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        return (name for (name,) in self._db.execute("SELECT name FROM known ORDER BY number"))

    def __len__(self) -> int:
        return _count(self._db)


class Records(Collection[T]):
    """Records under distinct names, in the order they were added. `make` is the `_make` of their named tuple, whose
    fields are text, numbers or None."""

    def __init__(self, make: Callable[[Iterable[Any]], T]) -> None:
        self._db = _database()
        self._make = make

    def add(self, name: str, record: T) -> bool:
        """Whether the name is new; under a known one nothing changes."""
        row = (name, json.dumps(record))
        return self._db.execute("INSERT OR IGNORE INTO known (name, record) VALUES (?, ?)", row).rowcount > 0

    def get(self, name: str) -> T | None:
        row = self._db.execute("SELECT record FROM known WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._make(json.loads(row[0]))

    def remove(self, name: str) -> None:
        self._db.execute("DELETE FROM known WHERE name = ?", (name,))

    def items(self) -> Iterator[tuple[str, T]]:
        rows = self._db.execute("SELECT name, record FROM known ORDER BY number")
        return ((name, self._make(json.loads(record))) for name, record in rows)

    def __contains__(self, record: object) -> bool:
        return any(each == record for each in self)

    def __iter__(self) -> Iterator[T]:
        return (record for _, record in self.items())

    def __len__(self) -> int:
        return _count(self._db)


def _database() -> sqlite3.Connection:
    db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = OFF")  # nothing is ever rolled back
    db.execute(f"PRAGMA cache_size = -{_CACHE}")
    db.execute("CREATE TABLE known (number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, record TEXT)")
    db.execute("BEGIN")  # for good: nothing is flushed between two names
    return db


def _count(db: sqlite3.Connection) -> int:
    count: int = db.execute("SELECT count(*) FROM known").fetchone()[0]
    return count
