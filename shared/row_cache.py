"""What was computed once and may be computed again: decoded pixels, embeddings. Rows of bytes by (space, key), in files
that every process of a machine shares.

Each file is an LMDB, memory-mapped, so a row is read without a copy and what is used stays in the system's page cache.
A commit is fsynced and never overwrites what a reader may see: a process killed while it writes loses that write and
nothing else. LMDB's own locks are off, since its table of readers goes by process ids, which are the same in two
containers that share a volume; `flock` on one file stands in: many readers, or one writer. The folder must therefore be
on a disk of the machine, not on a network file system.

Bounded: the files are generations of half the bound each. When the newest is full another is begun and only the one
before it is kept, so what goes is what was written longest ago. Nothing here is the truth and nothing here may fail a
job: what goes wrong is logged once and counts as a missing row.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import lmdb

log = logging.getLogger(__name__)

_NAME = re.compile(r"rows-(\d{8})\.mdb")
_CRC = 4  # bytes before each row: disks and file systems err, and a wrong pixel would go unseen
_SMALLEST = 1 << 20  # bytes of a file below which caching is not worth the trouble
_COMMIT_BYTES = 16 << 20  # rows written in one transaction: what other processes wait for
_PATIENCE = 20.0  # seconds to wait for another process's lock before going on without the cache
_BROKEN = (
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PageFullError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.ProblemError,
)


class _Broken(Exception):
    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path


class RowCache:
    """Safe between threads and processes. `max_bytes` bounds the files together; 0 keeps nothing."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes, self._file_bytes = max_bytes, max_bytes // 2
        self._open: dict[tuple[Path, int], lmdb.Environment] = {}  # by path and inode: a name may come again
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._warned = False

    def get_many(self, space: str, keys: Sequence[str]) -> list[bytes | None]:
        """The rows, None where there is none, in the order of `keys`."""
        found: list[bytes | None] = [None] * len(keys)

        def take(i: int, row: memoryview) -> None:
            found[i] = bytes(row)

        self.read(space, keys, take)
        return found

    def missing(self, space: str, keys: Sequence[str]) -> list[int]:
        """Positions of the keys without a row; no row is read."""
        absent = set(range(len(keys)))
        self.read(space, keys, lambda i, _: absent.discard(i), verify=False)
        return sorted(absent)

    def read(
        self, space: str, keys: Sequence[str], on_row: Callable[[int, memoryview], None], *, verify: bool = True
    ) -> None:
        """Calls on_row(i, row) for every key that has a row. The buffer is the mapped file itself, valid only inside
        the call, which must be quick and not use the cache. A row that is not what was written counts as missing."""
        names = [_name(space, key) for key in keys]
        with self._mutex, self._forgiving("read"), self._locked(fcntl.LOCK_SH):
            wanted = list(range(len(keys)))
            for path in reversed(self._files()):
                if not wanted or (environment := self._environment(path)) is None:
                    continue
                left = []
                with self._sound(path), environment.begin(buffers=True) as transaction:
                    for i in wanted:
                        row = transaction.get(names[i])
                        if row is None or (verify and zlib.crc32(row[_CRC:]) != int.from_bytes(row[:_CRC], "little")):
                            left.append(i)
                        else:
                            on_row(i, row[_CRC:])
                wanted = left

    def put_many(self, space: str, items: Mapping[str, bytes]) -> None:
        """Keeps the rows, each whole or not at all. Another value of the same key is replaced."""
        if self._file_bytes < _SMALLEST or not items:
            return
        for part in _parts(items, min(_COMMIT_BYTES, self._file_bytes // 4)):
            rows = [(_name(space, key), zlib.crc32(items[key]).to_bytes(_CRC, "little") + items[key]) for key in part]
            with self._mutex, self._forgiving("written"), self._locked(fcntl.LOCK_EX):
                self._write(rows)

    def close(self) -> None:
        with self._mutex:
            self._close()

    def _write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        for fresh in (False, True):
            path = self._newest(fresh)
            environment = self._environment(path, create=True)
            assert environment is not None  # created
            try:
                with self._sound(path), environment.begin(write=True) as transaction:
                    for name, row in rows:
                        transaction.put(name, row)
                return
            except lmdb.MapFullError:
                continue
        log.debug("a batch of rows does not fit into a file of the cache and is not kept")

    def _files(self) -> list[Path]:
        """Existing generations, oldest first. Others may have begun or dropped one since the last look."""
        if not self.directory.is_dir():
            return []
        paths = sorted(each for each in self.directory.iterdir() if _NAME.fullmatch(each.name))
        for gone in self._open.keys() - {(path, path.stat().st_ino) for path in paths}:
            self._open.pop(gone).close()
        return paths

    def _newest(self, fresh: bool) -> Path:
        """The file to write to; `fresh`: another one, and only its predecessor stays. Under the writers' lock."""
        paths = self._files()
        if paths and not fresh:
            return paths[-1]
        for old in paths[:-1]:
            self._remove(old)
        number = int(_NAME.fullmatch(paths[-1].name)[1]) + 1 if paths else 0  # type: ignore[index]
        return self.directory / f"rows-{number:08d}.mdb"

    def _environment(self, path: Path, create: bool = False) -> lmdb.Environment | None:
        """Raises _Broken for a file that is no whole LMDB. None: it is empty, its maker having been killed at once."""
        if not create and path.stat().st_size == 0:
            return None
        known = next((environment for (name, _), environment in self._open.items() if name == path), None)
        if known is not None:
            return known
        with self._sound(path):
            environment = lmdb.open(
                str(path),
                map_size=self._file_bytes,
                subdir=False,
                lock=False,
                metasync=False,
                meminit=False,
                mode=0o644,
            )
        used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        now = path.stat()
        if now.st_size < used:  # to read the mapped pages beyond the file's end would kill the process
            environment.close()
            raise _Broken(path, f"it is cut off at {now.st_size} of {used} bytes")
        self._open[path, now.st_ino] = environment
        return environment

    @contextlib.contextmanager
    def _sound(self, path: Path) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            raise _Broken(path, str(error)) from error

    @contextlib.contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """What goes wrong with the cache is no reason to fail: it is logged, once until it works again."""
        if self._pid != os.getpid():  # forked: the parent's maps are not ours to close
            self._open, self._pid = {}, os.getpid()
        try:
            yield
            if what == "written":
                self._warned = False
        except _Broken as error:
            log.warning("the cache file %s is begun anew: %s", error.path, error)
            self._close()
            with contextlib.suppress(OSError, TimeoutError), self._locked(fcntl.LOCK_EX):
                self._remove(error.path)
        except (OSError, lmdb.Error) as error:
            self._close()
            if not self._warned:
                log.warning("the cache in %s could not be %s: %s", self.directory, what, error)
            self._warned = True

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        if kind == fcntl.LOCK_EX:
            self.directory.mkdir(parents=True, exist_ok=True)
        elif not self.directory.is_dir():
            yield
            return
        # Opened anew each time: after a fork, or between threads, one open file would be one lock for both.
        descriptor = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            deadline, pause = time.monotonic() + _PATIENCE, 0.0005
            while True:
                try:
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError("another process holds its lock and does not let go") from None
                    time.sleep(pause)
                    pause = min(2 * pause, 0.02)
            yield
        finally:
            os.close(descriptor)

    def _remove(self, path: Path) -> None:
        """Whoever has it mapped goes on reading it until they look again."""
        for opened in [each for each in self._open if each[0] == path]:
            self._open.pop(opened).close()
        path.unlink(missing_ok=True)

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _name(space: str, key: str) -> bytes:
    """LMDB's names are at most 511 bytes."""
    return hashlib.blake2b(f"{space}\0{key}".encode(), digest_size=24).digest()


def _parts(items: Mapping[str, bytes], most: int) -> Iterator[list[str]]:
    """Keys in groups whose rows have at most so many bytes together (a larger row goes alone)."""
    part: list[str] = []
    size = 0
    for key, row in items.items():
        if part and size + len(row) > most:
            yield part
            part, size = [], 0
        part.append(key)
        size += len(row)
    if part:
        yield part


_caches: dict[tuple[int, Path], RowCache] = {}
_caches_lock = threading.Lock()


def open_cache(directory: Path, max_bytes: int) -> RowCache:
    """This process's one cache of the directory (LMDB may not be opened twice), with the bound it was first given."""
    with _caches_lock:
        return _caches.setdefault((os.getpid(), directory.resolve()), RowCache(directory.resolve(), max_bytes))
