"""The store in a bucket, on fsspec: `s3://bucket/prefix`.

What goes wrong between here and an object store has no common kind: s3fs raises PermissionError, OSError with an errno
of its choice, botocore's own errors and aiohttp's. All are told in the same words."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast
from uuid import uuid4

from shared.errors import Unavailable, from_disk
from shared.store.storage import Entry, Store, missing

log = logging.getLogger(__name__)


class ObjectStore(Store):
    """`fs`: a file system of fsspec's that keeps no memory of listings, as other processes write and delete."""

    deletes_at_once: ClassVar[int] = 1000  # by S3 in one request

    def __init__(self, fs: Any, root: str) -> None:
        super().__init__(root)
        self._fs = fs

    def _renewed(self, key: str) -> bool:
        return self.exists(key)

    def put_bytes(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with answering(writing=True):
            self._fs.pipe_file(path, data)

    def put_file(self, key: str, source: BinaryIO) -> None:
        path = self._path(key)
        with answering(writing=True), self._fs.open(path, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)

    def put_folder(self, key: str, source: Path) -> None:
        path = self._path(key)
        with answering(writing=True):
            for file in sorted(source.iterdir()):
                self._fs.put_file(str(file), f"{path}/{file.name}")

    def read_bytes(self, key: str) -> bytes:
        path = self._path(key)
        with _reading(key):
            return cast(bytes, self._fs.cat_file(path))

    @contextmanager
    def local_file(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            target = Path(folder) / path.rpartition("/")[2]
            with _reading(key):
                self._fs.get_file(path, str(target))
            yield target

    @contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            with _reading(key):
                for remote in self._fs.ls(path, detail=False):
                    self._fs.get_file(remote, str(Path(folder) / remote.rpartition("/")[2]))
            yield Path(folder)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with answering(writing=False):
            return bool(self._fs.exists(path))

    def delete(self, *keys: str) -> None:
        paths = [self._path(key) for key in keys]
        with suppress(FileNotFoundError), answering(writing=False):
            self._fs.rm(paths if len(paths) > 1 else paths[0], recursive=True)

    def drop_empty(self, key: str) -> None:
        """An object store has no folders."""

    def entries(self, key: str = "") -> Iterator[Entry]:
        path = self._path(key) if key else self.root
        prefix = f"{key}/" if key else ""
        found: list[dict[str, Any]] = []
        with suppress(FileNotFoundError), answering(writing=False):
            found = self._fs.ls(path, detail=True)
        for info in found:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            folder = info["type"] == "directory"
            if name and str(info["name"]).strip("/") != path.strip("/"):
                yield Entry(prefix + name, folder, int(info.get("size") or 0), 0.0 if folder else _modified(info))

    def now(self) -> float:
        key = f"health/{uuid4().hex}"
        self.put_bytes(key, b"ok")
        try:
            with answering(writing=False):
                return _modified(self._fs.info(self._path(key)))
        finally:
            self.delete(key)


@contextmanager
def answering(*, writing: bool) -> Iterator[None]:
    """Raises Unavailable where the object store does not do what it is asked to. That there is no such object is an
    answer to who reads or deletes; to who writes it means that there is no such bucket."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise
        log.error("the object store failed", exc_info=error)
        # A copy is made on a disk of ours, which may be full.
        raise (isinstance(error, OSError) and from_disk(error)) or Unavailable(
            "the object store does not answer, or refuses; try again, and if it lasts, tell whoever runs the server: "
            "its log has the reason",
            code="storage_failed",
            retry_after=10,
        ) from error


@contextmanager
def _reading(key: str) -> Iterator[None]:
    try:
        with answering(writing=False):
            yield
    except FileNotFoundError:
        raise missing(key) from None


def _modified(info: dict[str, Any]) -> float:
    """As S3 calls it."""
    at: datetime = info["LastModified"]
    return at.timestamp()
