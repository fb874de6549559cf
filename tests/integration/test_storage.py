import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from shared.errors import NotFound, StorageFull, Unavailable
from shared.store import disk
from shared.store.disk import DiskStore
from shared.store.object_store import answering
from shared.store.opening import open_store
from shared.store.storage import Store, sha256
from tests.integration.conftest import ROOT
from tests.s3_server import S3Server, s3_server


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, local: Store) -> Store:
    """On a disk, and on an object store, where a key is no path."""
    return local if request.param == "file" else open_store(request.getfixturevalue("s3").url())


def test_an_object_store_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server() as server:
        store = open_store(server.url())
        digest = store.put_blob(b"a")
        server.stop()
        calls: list[Callable[[], object]] = [
            lambda: store.read_blob(digest),
            lambda: store.put_bytes("uploads/x", b"b"),
            lambda: store.put_file("uploads/x", io.BytesIO(b"b")),
            lambda: store.exists("uploads/x"),
            lambda: store.delete("uploads/x"),
            lambda: list(store.entries("uploads")),
            store.check,
        ]
        for call in calls:
            with pytest.raises(Unavailable, match="the object store does not answer"):
                call()


def test_a_full_disk_under_a_copy_is_told_as_one() -> None:
    with pytest.raises(StorageFull), answering(writing=False):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_object_store_that_refuses_is_told(s3: S3Server) -> None:
    with pytest.raises(Unavailable, match="or refuses"):
        open_store("s3://captune-nobody-made-this/prefix").put_bytes("uploads/x", b"b")


def files(store: Store) -> list[str]:
    root = Path(store.root)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_blob_is_stored_under_its_hash_and_once(local: Store) -> None:
    data = b"the bytes of a picture"
    digest = local.put_blob(data)
    assert digest == sha256(data)
    assert files(local) == [f"blobs/{digest[:2]}/{digest}"]
    path = Path(local.root) / files(local)[0]
    written = path.stat().st_ino
    os.utime(path, (0, 0))
    assert local.put_blob(data) == digest
    assert path.stat().st_ino == written, "written again"
    assert path.stat().st_mtime > 0, "as old as it was: the collector may take it"
    assert local.read_blob(digest) == data


def test_many_may_store_the_same_blob_at_once(local: Store) -> None:
    data = os.urandom(300_000)
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(local.put_blob, [data] * 16))
    assert digests == {sha256(data)}
    assert files(local) == [local.blob_key(sha256(data))]
    assert local.read_blob(sha256(data)) == data


def test_many_blobs_at_once(store: Store) -> None:
    known = store.put_blob(b"known")
    blobs = [b"one", b"known", b"two", b"one", b""]
    assert store.put_blobs(blobs) == [sha256(data) for data in blobs]
    assert known == sha256(b"known")
    assert [store.read_blob(sha256(data)) for data in blobs] == blobs
    assert store.put_blobs([]) == []
    if isinstance(store, DiskStore):
        assert len(files(store)) == 4


def test_blobs_have_no_name_before_they_are_durable(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def look(_: int) -> None:
        found = files(local)
        seen.append((sum(name.endswith(".part") for name in found), len(found)))

    monkeypatch.setattr(disk, "sync_all", look)
    local.put_blobs([b"one", b"two"])
    assert seen == [(2, 2), (0, 2)], "synced unnamed, then named"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(disk, "sync_all", full)
    with pytest.raises(StorageFull):
        local.put_blobs([b"one", b"three"])
    assert len(files(local)) == 2, "what failed left nothing"


def test_where_the_system_cannot_sync_all_each_blob_is_synced(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_syncfs", lambda: None)
    assert local.put_blobs([b"one", b"two"]) == [sha256(b"one"), sha256(b"two")]
    assert local.read_blob(sha256(b"two")) == b"two"


def test_what_is_put_is_read(store: Store, tmp_path: Path) -> None:
    digest = store.put_blob(b"blob")
    assert store.read_blob(digest) == b"blob"
    store.put_bytes("a/b", b"one")
    store.put_bytes("a/b", b"two")
    assert store.read_bytes("a/b") == b"two"
    store.put_file("uploads/x", io.BytesIO(b"streamed"))
    with store.local_file("uploads/x") as path:
        assert path.read_bytes() == b"streamed"
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    (source / "config").write_bytes(b"c")
    store.put_folder("classifiers/clf_1", source)
    with store.local_folder("classifiers/clf_1") as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"weights": b"w", "config": b"c"}
    store.delete("classifiers/clf_1")
    assert not store.exists("classifiers/clf_1")
    store.delete("classifiers/clf_1")  # gone already
    store.check()


def test_what_is_missing_is_named(store: Store) -> None:
    with pytest.raises(NotFound, match="no/such"):
        store.read_bytes("no/such")
    with pytest.raises(NotFound), store.local_file("no/such"):
        pass
    with pytest.raises(NotFound), store.local_folder("no/such"):
        pass


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "/etc/passwd", "", ".."])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str, tmp_path: Path) -> None:
    for call in (store.read_bytes, store.exists, store.delete):
        with pytest.raises(ValueError, match="bad storage key"):
            call(key)
    with pytest.raises(ValueError, match="bad storage key"):
        store.put_bytes(key, b"x")
    with pytest.raises(ValueError, match="bad storage key"):
        store.put_folder(key, tmp_path)


class Breaking(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError("the connection broke")
        return super().read(1000)


def test_a_write_that_fails_leaves_nothing(local: Store) -> None:
    with pytest.raises(OSError, match="broke"):
        local.put_file("uploads/x", Breaking(b"x" * 5000))
    assert not local.exists("uploads/x")
    assert files(local) == []


def test_a_write_that_fails_keeps_what_was_there(local: Store) -> None:
    local.put_bytes("uploads/x", b"whole")
    with pytest.raises(OSError, match="broke"):
        local.put_file("uploads/x", Breaking(b"x" * 5000))
    assert local.read_bytes("uploads/x") == b"whole"


def test_a_folder_that_could_not_be_written_leaves_nothing(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"w")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        local.put_folder("classifiers/x", source)
    assert not local.exists("classifiers/x")
    assert files(local) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from shared.store.opening import open_store
store = open_store(sys.argv[1])
class Source:
    calls = 0
    def read(self, size):
        self.calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return b"x" * 100_000
store.put_bytes("before", b"ok")
if sys.argv[2] == "file":
    store.put_file("uploads/x", Source())
else:
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    store.put_folder("classifiers/x", Path(sys.argv[3]))
"""


@pytest.mark.parametrize(("what", "key"), [("file", "uploads/x"), ("folder", "classifiers/x")])
def test_a_process_killed_in_the_middle_leaves_no_visible_object(
    local: Store, tmp_path: Path, what: str, key: str
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"w" * 1000)
    command = [sys.executable, "-c", KILLED, f"file://{local.root}", what, str(source)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert local.exists("before")
    assert not local.exists(key)
    with pytest.raises(NotFound):
        local.read_bytes(key)
    (local.put_file(key, io.BytesIO(b"y")) if what == "file" else local.put_folder(key, source))  # again works
    assert local.exists(key)


@pytest.mark.parametrize("where", ["local_file", "local_folder"])
def test_what_is_deleted_while_it_is_read_is_missing(local: Store, tmp_path: Path, where: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w")
    local.put_folder("classifiers/x", tmp_path / "model")
    local.put_bytes("predictions/x", b"p")
    key, inside = ("predictions/x", "") if where == "local_file" else ("classifiers/x", "weights")

    def read() -> None:
        with getattr(local, where)(key) as path:
            local.delete(key)
            (path / inside).read_bytes()

    with pytest.raises(NotFound, match=key):
        read()
    local.put_bytes("predictions/x", b"p")
    with pytest.raises(FileNotFoundError), local.local_file("predictions/x"):
        Path("/nonexistent").read_bytes()  # something else that is missing
