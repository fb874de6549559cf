"""The object store, on fsspec: `file:///var/lib/captune` or `s3://bucket/prefix`.

Images are content-addressed (`blobs/ab/abcd…`, SHA-256), so the same bytes are stored once. Everything else is
written under a key that is used once; the database names a key only after it was written whole."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared.errors import NotFound


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Store:
    """Raises `NotFound` for a missing key; `OSError` where the store itself fails."""

    def __init__(self, url: str) -> None:
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"bad storage key {key!r}")  # keys are ours, never a user's text
        return f"{self.root}/{key}"

    @staticmethod
    def blob_key(digest: str) -> str:
        return f"blobs/{digest[:2]}/{digest}"

    def put_blob(self, data: bytes) -> str:
        """Store bytes under their SHA-256 and return it; a no-op where they are stored already."""
        digest = sha256(data)
        if not self.fs.exists(self._path(self.blob_key(digest))):
            self.put_bytes(self.blob_key(digest), data)
        return digest

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
            with self.fs.open(path, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            return
        self._write_local(path, lambda out: shutil.copyfileobj(source, out, 1 << 20))

    def _write_local(self, path: str, write: Callable[[BinaryIO], None]) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{uuid4().hex}.part"
        try:
            with open(temporary, "wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def read_bytes(self, key: str) -> bytes:
        try:
            return cast(bytes, self.fs.cat_file(self._path(key)))
        except FileNotFoundError:
            raise NotFound(f"the store has no object '{key}'; it was deleted or the store was replaced") from None

    def exists(self, key: str) -> bool:
        return bool(self.fs.exists(self._path(key)))

    def delete(self, key: str) -> None:
        """Remove an object or a folder; a missing one is no error."""
        with suppress(FileNotFoundError):
            self.fs.rm(self._path(key), recursive=True)

    @contextmanager
    def local_file(self, key: str) -> Iterator[Path]:
        """The object as a local path: itself on `file://`, else a temporary copy."""
        path = self._path(key)
        if not self.exists(key):
            raise NotFound(f"the store has no object '{key}'; it was deleted or the store was replaced")
        if self.local:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            target = Path(folder) / path.rsplit("/", 1)[-1]
            self.fs.get_file(path, str(target))
            yield target

    def put_folder(self, key: str, source: Path) -> None:
        """Move a local folder (files only, already fsynced) into the store. On `file://` it appears in one rename."""
        path = self._path(key)
        if not self.local:
            for file in sorted(source.iterdir()):
                self.fs.put_file(str(file), f"{path}/{file.name}")
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{target.name}.{uuid4().hex}.part"
        try:
            shutil.copytree(source, temporary)
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    @contextmanager
    def local_folder(self, key: str) -> Iterator[Path]:
        """The folder as a local path: itself on `file://`, else a temporary copy."""
        path = self._path(key)
        if not self.exists(key):
            raise NotFound(f"the store has no folder '{key}'; it was deleted or the store was replaced")
        if self.local:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            for remote in self.fs.ls(path, detail=False):
                self.fs.get_file(remote, str(Path(folder) / remote.rsplit("/", 1)[-1]))
            yield Path(folder)

    def check(self) -> None:
        """Raises where the store cannot be written."""
        key = f"health/{uuid4().hex}"
        self.put_bytes(key, b"ok")
        self.delete(key)
