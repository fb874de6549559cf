"""The object store, on fsspec: `file:///var/lib/captune` or `s3://bucket/prefix`.

Images are content-addressed (`blobs/ab/abcd…`, SHA-256), so the same bytes are stored once. Everything else is
written under a key that is used once; the database names a key only after it was written whole. Which rows name which
keys: shared/store/references.py. What no row names is removed by shared/store/collector.py."""

import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared.errors import NotFound, Unavailable, from_disk
from shared.store.remote import Remote, answering

_NUMBER = re.compile(r"\[Errno (\d+)\]")
PART = ".part"  # ends the name of what is being written, or being removed


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file or folder of the store. modified: seconds, by the store's own clock; 0 for a folder of an object store,
    which has none of its own."""

    key: str
    folder: bool
    bytes: int
    modified: float


class Store:
    """Raises `NotFound` for a missing key, `Unavailable` (`StorageFull`) where a disk fails (is full) during a write or
    an object store does not do as it is asked, `OSError` where a disk fails otherwise."""

    def __init__(self, url: str) -> None:
        # No memory of listings: other processes write and delete.
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.root = root.rstrip("/")
        self.local = isinstance(fs, LocalFileSystem)
        self.fs: Any = fs if self.local else Remote(fs)

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"bad storage key {key!r}")  # keys are ours, never a user's text
        return f"{self.root}/{key}"

    @staticmethod
    def blob_key(digest: str) -> str:
        return f"blobs/{digest[:2]}/{digest}"

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their SHA-256 and return it; where they are stored already, they only become young again
        (on a disk), so that the collector leaves them alone. The row that names them is written under
        `references.keep`."""
        digest = sha256(data)
        path = self._path(self.blob_key(digest))
        if not (self._touched(path) if self.local else self.fs.exists(path)):
            self.put_bytes(self.blob_key(digest), data)
        return digest

    def put_blobs(self, blobs: Sequence[bytes]) -> list[str]:
        """`put_blob` for many at once: an object store takes them side by side, a disk makes them durable together,
        first the bytes, then the names. None has its name before its bytes are durable."""
        if not self.local or _syncfs() is None:
            with ThreadPoolExecutor(16) as pool:
                return list(pool.map(self.put_blob, blobs))
        digests = [sha256(data) for data in blobs]
        contents = {self._path(self.blob_key(digest)): data for digest, data in zip(digests, blobs, strict=True)}
        parts = {_aside(path): path for path in contents if not self._touched(path)}
        with _disk_errors(), _file_system(f"{self.root}/blobs") as descriptor:
            try:
                for part, path in parts.items():
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    with open(part, "wb") as out:
                        out.write(contents[path])
                sync_all(descriptor)
                for part, path in parts.items():
                    os.replace(part, path)
                sync_all(descriptor)
            except BaseException:
                for part in parts:
                    with suppress(OSError):
                        os.unlink(part)
                raise
        return digests

    @staticmethod
    def _touched(path: str) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except PermissionError:  # another account's file: there, and as old as it is
            return os.path.exists(path)
        return True

    def read_blob(self, digest: str) -> bytes:
        return self.read_bytes(self.blob_key(digest))

    def put_bytes(self, key: str, data: bytes) -> None:
        """Atomic: a reader sees all of it or nothing."""
        path = self._path(key)
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        self._write_local(path, lambda out: cast(None, out.write(data)))

    def put_file(self, key: str, source: BinaryIO) -> None:
        """Stream a file into the store; memory stays flat."""
        path = self._path(key)
        if not self.local:
            with answering(writing=True), self.fs.open(path, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            return
        self._write_local(path, lambda out: shutil.copyfileobj(source, out, 1 << 20))

    def _write_local(self, path: str, write: Callable[[BinaryIO], None]) -> None:
        temporary = _aside(path)
        with _disk_errors():
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as out:
                    write(out)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(temporary, path)
                _sync_folder(os.path.dirname(path))
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise

    def read_bytes(self, key: str) -> bytes:
        try:
            return cast(bytes, self.fs.cat_file(self._path(key)))
        except FileNotFoundError:
            raise _missing(key) from None

    def exists(self, key: str) -> bool:
        return bool(self.fs.exists(self._path(key)))

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there, in the given order."""
        if self.local:
            return [key for key in keys if not os.path.exists(self._path(key))]
        with ThreadPoolExecutor(16) as pool:
            return [key for key, there in zip(keys, pool.map(self.exists, keys), strict=True) if not there]

    def delete(self, *keys: str) -> None:
        """Remove objects and folders; a missing one is no error. On `file://` a folder is gone at once."""
        paths = [self._path(key) for key in keys]
        if not self.local:
            with suppress(FileNotFoundError):
                self.fs.rm(paths if len(paths) > 1 else paths[0], recursive=True)
            return
        for path in paths:
            with suppress(FileNotFoundError):
                if os.path.isdir(path):
                    shutil.rmtree(self._set_aside(path))
                else:
                    os.unlink(path)

    @staticmethod
    def _set_aside(path: str) -> str:
        """Under a name that nobody looks for. Whoever still writes to the old one finds it gone."""
        aside = _aside(path.removesuffix(PART))
        os.rename(path, aside)
        return aside

    def drop_empty(self, key: str) -> None:
        """Remove a folder that has nothing in it; one that has stays."""
        if self.local:
            with suppress(OSError):
                os.rmdir(self._path(key))

    def entries(self, key: str = "") -> Iterator[Entry]:
        """What lies directly in a folder ("": the root), in no order; nothing where there is none. On `file://` memory
        stays flat; on an object store it grows with the folder."""
        path = self._path(key) if key else self.root
        prefix = f"{key}/" if key else ""
        if self.local:
            with suppress(FileNotFoundError), os.scandir(path) as found:
                for each in found:
                    with suppress(FileNotFoundError):  # gone meanwhile
                        status = each.stat(follow_symlinks=False)
                        folder = each.is_dir(follow_symlinks=False)
                        yield Entry(prefix + each.name, folder, 0 if folder else status.st_size, status.st_mtime)
            return
        with suppress(FileNotFoundError):
            for info in self.fs.ls(path, detail=True):
                name = str(info["name"]).rstrip("/").rpartition("/")[2]
                folder = info["type"] == "directory"
                if name and str(info["name"]).strip("/") != path.strip("/"):
                    yield Entry(prefix + name, folder, int(info.get("size") or 0), 0.0 if folder else _modified(info))

    def measure(self, entry: Entry) -> Entry:
        """A folder with all that is in it: the sum of bytes, the latest modification. A file as it is."""
        if not entry.folder:
            return entry
        inside = [self.measure(each) for each in self.entries(entry.key)]
        modified = max([entry.modified, *(each.modified for each in inside)])
        return Entry(entry.key, True, sum(each.bytes for each in inside), modified)

    def now(self) -> float:
        """The store's own clock: what an object written now would be dated. Works on a full disk."""
        if self.local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            os.utime(self.root)
            return os.stat(self.root).st_mtime
        key = f"health/{uuid4().hex}"
        self.put_bytes(key, b"ok")
        try:
            return _modified(self.fs.info(self._path(key)))
        finally:
            self.delete(key)

    @contextmanager
    def local_file(self, key: str) -> Iterator[Path]:
        """The object as a local path: itself on `file://`, else a temporary copy."""
        path = self._path(key)
        if self.local:
            if not os.path.exists(path):
                raise _missing(key)
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            target = Path(folder) / path.rsplit("/", 1)[-1]
            try:
                self.fs.get_file(path, str(target))
            except FileNotFoundError:
                raise _missing(key) from None
            yield target

    def put_folder(self, key: str, source: Path) -> None:
        """Move a local folder (files only, already fsynced) into the store. On `file://` it appears in one rename."""
        path = self._path(key)
        if not self.local:
            for file in sorted(source.iterdir()):
                self.fs.put_file(str(file), f"{path}/{file.name}")
            return
        temporary = Path(_aside(path))
        with _disk_errors():
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, temporary)
                for file in temporary.iterdir():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                _sync_folder(str(temporary))
                os.replace(temporary, path)
                _sync_folder(os.path.dirname(path))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    @contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """The folder as a local path: itself on `file://`, else a temporary copy."""
        path = self._path(key)
        if self.local:
            if not os.path.exists(path):
                raise _missing(key)
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            try:
                for remote in self.fs.ls(path, detail=False):
                    self.fs.get_file(remote, str(Path(folder) / remote.rsplit("/", 1)[-1]))
            except FileNotFoundError:
                raise _missing(key) from None
            yield Path(folder)

    def check(self) -> None:
        """Raises where the store cannot be written."""
        key = f"health/{uuid4().hex}"
        self.put_bytes(key, b"ok")
        self.delete(key)


def _missing(key: str) -> NotFound:
    return NotFound(f"the store has nothing at '{key}'; it was deleted or the store was replaced")


def _aside(path: str) -> str:
    return f"{path}.{uuid4().hex}{PART}"


def _modified(info: dict[str, Any]) -> float:
    """As S3 calls it."""
    at: datetime = info["LastModified"]
    return at.timestamp()


def _sync_folder(path: str) -> None:
    """Make the names in it durable: a row that is committed next names them."""
    with _file_system(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _file_system(folder: str) -> Iterator[int]:
    """A descriptor of the folder, which is made where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@cache
def _syncfs() -> Callable[[int], int] | None:
    """The C library's, which only Linux has. A fifth of the processor time of one fsync per small file, and less
    waiting: docs/log.md."""
    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)


def sync_all(descriptor: int) -> None:
    """Make all that was written to the file system durable. Reports what failed since the descriptor was opened."""
    syncfs = _syncfs()
    assert syncfs is not None
    if syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A disk's refusals in words. `shutil.Error` carries those of the files it could not copy as text alone."""
    try:
        yield
    except FileNotFoundError as error:  # a process that slept for longer than the collector keeps unfinished writes
        raise Unavailable("what was being written was removed meanwhile; trying again writes it anew.") from error
    except OSError as error:
        known = from_disk(error) or from_disk(_first_of(error))
        if known is None:
            raise
        raise known from error


def _first_of(error: OSError) -> OSError:
    for number in _NUMBER.findall(str(error)) if isinstance(error, shutil.Error) else ():
        return OSError(int(number), os.strerror(int(number)))
    return error
