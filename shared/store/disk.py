"""The store on a disk that every process mounts: `file:///var/lib/captune`. An object is written aside, made durable,
then renamed, so that whoever dies in between leaves nothing that a key names."""

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, ClassVar, cast
from uuid import uuid4

from shared.errors import Unavailable, from_disk
from shared.store.storage import PART, Entry, Store, missing, sha256

_NUMBER = re.compile(r"\[Errno (\d+)\]")


class DiskStore(Store):
    deletes_at_once: ClassVar[int] = 1  # what cannot be removed then holds nothing else up

    def put_blobs(self, blobs: Sequence[bytes]) -> list[str]:
        """Made durable together, first the bytes, then the names."""
        if _syncfs() is None:
            return super().put_blobs(blobs)
        digests = [sha256(data) for data in blobs]
        contents = {self.blob_key(digest): data for digest, data in zip(digests, blobs, strict=True)}
        parts = {_aside(self._path(key)): key for key in contents if not self._renewed(key)}
        with _disk_errors(), _file_system(f"{self.root}/blobs") as descriptor:
            try:
                for part, key in parts.items():
                    Path(part).parent.mkdir(parents=True, exist_ok=True)
                    with open(part, "wb") as out:
                        out.write(contents[key])
                sync_all(descriptor)
                for part, key in parts.items():
                    os.replace(part, self._path(key))
                sync_all(descriptor)
            except BaseException:
                for part in parts:
                    with suppress(OSError):
                        os.unlink(part)
                raise
        return digests

    def _renewed(self, key: str) -> bool:
        path = self._path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except PermissionError:  # another account's file: there, and as old as it is
            return os.path.exists(path)
        return True

    def put_bytes(self, key: str, data: bytes) -> None:
        self._write(key, lambda out: cast(None, out.write(data)))

    def put_file(self, key: str, source: BinaryIO) -> None:
        self._write(key, lambda out: shutil.copyfileobj(source, out, 1 << 20))

    def _write(self, key: str, write: Callable[[BinaryIO], None]) -> None:
        path = self._path(key)
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

    def put_folder(self, key: str, source: Path) -> None:
        path = self._path(key)
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

    def read_bytes(self, key: str) -> bytes:
        try:
            return Path(self._path(key)).read_bytes()
        except FileNotFoundError:
            raise missing(key) from None

    @contextmanager
    def local_file(self, key: str) -> Iterator[Path]:
        path = Path(self._path(key))
        if not path.exists():
            raise missing(key)
        try:
            yield path
        except FileNotFoundError:
            if path.exists():
                raise
            raise missing(key) from None  # deleted while it was read

    local_folder = local_file

    def exists(self, key: str) -> bool:
        return os.path.exists(self._path(key))

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if not self.exists(key)]

    def delete(self, *keys: str) -> None:
        for path in [self._path(key) for key in keys]:
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
        with suppress(OSError):
            os.rmdir(self._path(key))

    def entries(self, key: str = "") -> Iterator[Entry]:
        prefix = f"{key}/" if key else ""
        with suppress(FileNotFoundError), os.scandir(self._path(key) if key else self.root) as found:
            for each in found:
                with suppress(FileNotFoundError):  # gone meanwhile
                    status = each.stat(follow_symlinks=False)
                    folder = each.is_dir(follow_symlinks=False)
                    yield Entry(prefix + each.name, folder, 0 if folder else status.st_size, status.st_mtime)

    def now(self) -> float:
        Path(self.root).mkdir(parents=True, exist_ok=True)
        os.utime(self.root)
        return os.stat(self.root).st_mtime


def _aside(path: str) -> str:
    return f"{path}.{uuid4().hex}{PART}"


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
