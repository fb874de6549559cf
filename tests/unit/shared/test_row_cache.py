"""shared/row_cache.py: real files, real processes, real kills."""

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.row_cache import RowCache, open_cache

ROOT = Path(__file__).parents[3]
MB = 1 << 20


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[RowCache]:
    cache = RowCache(tmp_path / "rows", 64 * MB)
    yield cache
    cache.close()


def row(key: str, size: int = 20_000) -> bytes:
    """A row that only its key makes."""
    return (key.encode() + b".") * (size // (len(key) + 1))


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that has `cache` on the folder given first."""
    start = "import os, sys\nfrom pathlib import Path\nfrom shared.row_cache import RowCache\n"
    start += f"cache = RowCache(Path(sys.argv[1]), {64 * MB})\n"
    start += "def row(key, size=20_000): return (key.encode() + b'.') * (size // (len(key) + 1))\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def files(cache: RowCache) -> list[Path]:
    return sorted(cache.directory.glob("rows-*.mdb"))


ROWS = st.dictionaries(st.text(max_size=8), st.binary(max_size=10_000), max_size=12)


@given(steps=st.lists(st.tuples(st.sampled_from(["a", "b"]), ROWS), max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_are_what_was_put_last(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache, expected = RowCache(directory, 64 * MB), dict[tuple[str, str], bytes]()
    for space, items in steps:
        cache.put_many(space, items)
        expected |= {(space, key): value for key, value in items.items()}
    cache.close()
    again = RowCache(directory, 64 * MB)
    for space in ("a", "b"):
        keys = [key for name, key in expected if name == space] + ["never put"]
        assert again.get_many(space, keys) == [expected.get((space, key)) for key in keys]
        assert again.missing(space, keys) == [len(keys) - 1]
    again.close()


def test_an_empty_or_disabled_cache_gives_nothing(tmp_path: Path) -> None:
    none = RowCache(tmp_path / "none", 0)
    none.put_many("s", {"a": b"1"})
    assert none.get_many("s", ["a"]) == [None]
    assert not (tmp_path / "none").exists()


def test_a_process_has_one_cache_of_a_directory(tmp_path: Path) -> None:
    first = open_cache(tmp_path / "rows", 64 * MB)
    assert open_cache(tmp_path / "." / "rows", 128 * MB) is first
    assert open_cache(tmp_path / "other", 64 * MB) is not first


def test_two_processes_fill_one_cache_at_once(cache: RowCache) -> None:
    code = """
        for batch in range(20):
            keys = [f"{sys.argv[2]}-{batch}-{i}" for i in range(10)] + [f"both-{batch}"]
            cache.put_many("s", {key: row(key) for key in keys})
            assert cache.get_many("s", keys) == [row(key) for key in keys]
    """
    writers = [python(code, cache.directory, name) for name in ("x", "y")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    keys = [f"{name}-{batch}-{i}" for name in "xy" for batch in range(20) for i in range(10)]
    keys += [f"both-{batch}" for batch in range(20)]
    assert cache.get_many("s", keys) == [row(key) for key in keys]


def test_threads_share_a_cache(cache: RowCache) -> None:
    failures: list[object] = []

    def work(name: int) -> None:
        for i in range(30):
            key = f"{name}-{i}"
            cache.put_many("s", {key: row(key)})
            if cache.get_many("s", [key]) != [row(key)]:
                failures.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("attempt", range(4))
def test_a_writer_killed_in_the_middle_harms_nothing(cache: RowCache, attempt: int) -> None:
    cache.put_many("s", {f"before-{i}": row(f"before-{i}") for i in range(100)})
    writer = python(
        """
        for i in range(100_000):
            cache.put_many("s", {f"{i}-{j}": row(f"{i}-{j}") for j in range(5)})
            print(i, flush=True)
        """,
        cache.directory,
    )
    assert writer.stdout is not None
    done = [int(writer.stdout.readline()) for _ in range(3 + 2 * attempt)]
    time.sleep(0.003 * attempt)
    os.kill(writer.pid, signal.SIGKILL)
    done += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    writer.wait()
    keys = [f"before-{i}" for i in range(100)] + [f"{i}-{j}" for i in done for j in range(5)]
    assert cache.get_many("s", keys) == [row(key) for key in keys]
    cache.put_many("s", {"after": row("after")})
    cache.close()
    fresh = RowCache(cache.directory, 64 * MB)
    assert fresh.get_many("s", [*keys, "after"]) == [row(key) for key in [*keys, "after"]]
    fresh.close()


def test_a_process_that_holds_the_lock_is_not_waited_for_forever(
    cache: RowCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shared.row_cache._PATIENCE", 0.1)
    cache.put_many("s", {"a": b"1"})
    held = (
        "import fcntl\nlock = open(cache.directory / 'lock')\nfcntl.flock(lock, fcntl.LOCK_EX)\nprint(1, flush=True)\n"
    )
    holder = python(held + "import time; time.sleep(60)", cache.directory)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert cache.get_many("s", ["a"]) == [None]
        cache.put_many("s", {"b": b"2"})
        assert "does not let go" in caplog.text
    finally:
        holder.kill()
        holder.wait()
    assert cache.get_many("s", ["a"]) == [b"1"]


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(100_000))


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _stump(path: Path) -> None:
    os.truncate(path, 100)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _text(path: Path) -> None:
    path.write_text("not a cache")


@pytest.mark.parametrize("damage", [_garbage, _half, _stump, _emptied, _text])
def test_a_damaged_file_is_begun_anew(cache: RowCache, damage, caplog: pytest.LogCaptureFixture) -> None:
    cache.put_many("s", {str(i): row(str(i)) for i in range(100)})
    cache.close()
    damage(files(cache)[0])
    # In a process of its own: reading beyond a truncated file's end would kill it.
    code = """
        found = cache.get_many("s", [str(i) for i in range(100)])
        assert all(value in (None, row(str(i))) for i, value in enumerate(found))
        cache.put_many("s", {"new": row("new")})
        assert cache.get_many("s", ["new"]) == [row("new")]
    """
    assert python(code, cache.directory).wait(30) == 0
    assert cache.get_many("s", ["new"]) == [row("new")]


def test_bytes_that_changed_on_the_disk_are_missing_not_wrong(cache: RowCache) -> None:
    keys = [str(i) for i in range(100)]
    cache.put_many("s", {key: row(key) for key in keys})
    cache.close()
    path = files(cache)[0]
    content = bytearray(path.read_bytes())
    at = content.index(b"57." * 500) + 1000
    content[at] ^= 1
    path.write_bytes(content)
    assert cache.get_many("s", keys) == [None if key == "57" else row(key) for key in keys]
    cache.put_many("s", {"57": row("57")})
    assert cache.get_many("s", ["57"]) == [row("57")]


def test_a_cache_removed_meanwhile_is_filled_again(cache: RowCache) -> None:
    cache.put_many("s", {"a": row("a")})
    shutil.rmtree(cache.directory)
    assert cache.get_many("s", ["a"]) == [None]
    cache.put_many("s", {"b": row("b")})
    assert cache.get_many("s", ["a", "b"]) == [None, row("b")]


def test_the_bound_is_respected_and_the_newest_rows_stay(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 8 * MB)
    for batch in range(40):  # 40 MB in all
        cache.put_many("s", {f"{batch}-{i}": os.urandom(100_000) for i in range(10)})
        assert sum(path.stat().st_size for path in files(cache)) <= 8 * MB
    kept = [batch for batch in range(40) if cache.get_many("s", [f"{batch}-0"]) != [None]]
    assert kept == list(range(kept[0], 40)), "what goes is the oldest"
    assert 3 <= len(kept) < 9
    assert len(files(cache)) == 2
    cache.close()


def test_another_process_follows_when_files_come_and_go(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 4 * MB)
    reader = python(
        """
        for line in sys.stdin:
            found = cache.get_many("s", line.split())
            print(sum(value is not None for value in found), flush=True)
        """,
        tmp_path,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        for batch in range(12):
            keys = [f"{batch}-{i}" for i in range(5)]
            cache.put_many("s", {key: os.urandom(100_000) for key in keys})
            print(*keys, file=reader.stdin, flush=True)
            assert reader.stdout.readline() == "5\n"
    finally:
        reader.kill()
        reader.wait()
        cache.close()


def test_rows_too_large_for_a_file_are_not_kept(tmp_path: Path) -> None:
    cache = RowCache(tmp_path, 4 * MB)
    cache.put_many("s", {"small": b"1"})
    cache.put_many("s", {"large": bytes(3 * MB)})
    assert cache.get_many("s", ["large"]) == [None]
    cache.put_many("s", {"small": b"2"})
    assert cache.get_many("s", ["small"]) == [b"2"]
    cache.close()


def _fill_a_full_disk(directory: Path, results: "multiprocessing.Queue[object]") -> None:
    """A file may not grow beyond 2 MB here, as on a disk that is full by then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, 2 * MB))
    logging.disable()
    cache = RowCache(directory, 64 * MB)
    for i in range(200):
        cache.put_many("s", {str(i): row(str(i), 50_000)})
    found = cache.get_many("s", [str(i) for i in range(200)])
    results.put([None if value is None else value == row(str(i), 50_000) for i, value in enumerate(found)])


def test_a_full_disk_is_a_missing_row_and_no_error(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_fill_a_full_disk, args=(tmp_path, results))
    process.start()
    found = results.get(timeout=60)
    process.join(30)
    assert process.exitcode == 0
    assert found.count(True) > 20, "what fitted is there"
    assert found.count(None) > 100
    assert False not in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o500)
    cache = RowCache(tmp_path / "rows", 64 * MB)
    for _ in range(3):
        cache.put_many("s", {"a": b"1"})
        assert cache.get_many("s", ["a"]) == [None]
    assert caplog.text.count("could not be written") == 1, "said once"


def test_a_file_in_the_way_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows").write_text("")
    cache = RowCache(tmp_path / "rows", 64 * MB)
    for _ in range(3):
        cache.put_many("s", {"a": b"1"})
        assert cache.get_many("s", ["a"]) == [None]
    assert caplog.text.count("could not be written") == 1, "said once"


def test_a_forked_child_reads_on(cache: RowCache) -> None:
    cache.put_many("s", {"a": row("a")})
    child = os.fork()
    if child == 0:
        ok = cache.get_many("s", ["a"]) == [row("a")]
        cache.put_many("s", {"child": row("child")})
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get_many("s", ["a", "child"]) == [row("a"), row("child")]
