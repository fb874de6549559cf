"""The object store: what it promises, wherever it keeps things (disk.py, object_store.py).

Images are content-addressed (`blobs/ab/abcd…`, SHA-256), so the same bytes are stored once. Everything else is
written under a key that is used once; the database names a key only after it was written whole. Which rows name which
keys: shared/store/references.py. What no row names is removed by shared/store/collector.py."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar
from uuid import uuid4

from shared.errors import NotFound

PART = ".part"  # ends the name of what is being written, or being removed
AT_ONCE = 16  # calls side by side, where many objects are asked for


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


class Store(ABC):
    """Raises `NotFound` for a missing key, `Unavailable` (`StorageFull`) where a disk fails (is full) during a write or
    an object store does not do as it is asked, `OSError` where a disk fails otherwise."""

    deletes_at_once: ClassVar[int]  # as many keys as one `delete` is best given

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/")

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
        key = self.blob_key(digest)
        if not self._renewed(key):
            self.put_bytes(key, data)
        return digest

    def put_blobs(self, blobs: Sequence[bytes]) -> list[str]:
        """`put_blob` for many at once. None has its name before its bytes are durable."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.put_blob, blobs))

    @abstractmethod
    def _renewed(self, key: str) -> bool:
        """Whether the object is there. Where objects can be made young again, it is."""

    def read_blob(self, digest: str) -> bytes:
        return self.read_bytes(self.blob_key(digest))

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None:
        """Atomic: a reader sees all of it or nothing."""

    @abstractmethod
    def put_file(self, key: str, source: BinaryIO) -> None:
        """Stream a file into the store; memory stays flat. Atomic, as `put_bytes`."""

    @abstractmethod
    def put_folder(self, key: str, source: Path) -> None:
        """Copy a local folder (files only) into the store. On a disk it appears in one rename."""

    @abstractmethod
    def read_bytes(self, key: str) -> bytes: ...

    @abstractmethod
    def local_file(self, key: str) -> AbstractContextManager[Path]:
        """The object as a local path: itself on a disk, else a temporary copy."""

    @abstractmethod
    def local_folder(self, key: str) -> AbstractContextManager[Path]:
        """The folder as a local path: itself on a disk, else a temporary copy."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not there, in the given order."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [key for key, there in zip(keys, pool.map(self.exists, keys), strict=True) if not there]

    @abstractmethod
    def delete(self, *keys: str) -> None:
        """Remove objects and folders; a missing one is no error. On a disk a folder is gone at once."""

    @abstractmethod
    def drop_empty(self, key: str) -> None:
        """Remove a folder that has nothing in it; one that has stays."""

    @abstractmethod
    def entries(self, key: str = "") -> Iterator[Entry]:
        """What lies directly in a folder ("": the root), in no order; nothing where there is none. On a disk memory
        stays flat; on an object store it grows with the folder."""

    def measure(self, entry: Entry) -> Entry:
        """A folder with all that is in it: the sum of bytes, the latest modification. A file as it is."""
        if not entry.folder:
            return entry
        inside = [self.measure(each) for each in self.entries(entry.key)]
        modified = max([entry.modified, *(each.modified for each in inside)])
        return Entry(entry.key, True, sum(each.bytes for each in inside), modified)

    @abstractmethod
    def now(self) -> float:
        """The store's own clock, in seconds: what an object written now would be dated. Works on a full disk."""

    def check(self) -> None:
        """Raises where the store cannot be written."""
        key = f"health/{uuid4().hex}"
        self.put_bytes(key, b"ok")
        self.delete(key)


def missing(key: str) -> NotFound:
    return NotFound(f"the store has nothing at '{key}'; it was deleted or the store was replaced")
