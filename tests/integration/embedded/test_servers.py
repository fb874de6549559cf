"""Real servers: they answer, keep what they were given, survive every kind of crash, and leave nothing behind."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import psycopg
import pytest
from redis import Redis
from sqlalchemy import create_engine, text

from services.embedded import cluster
from services.embedded.lock import StateLock
from services.embedded.processes import running_in
from services.embedded.servers import Server, start_postgres, start_valkey
from shared.errors import Conflict, Unavailable

ROOT = Path(__file__).parents[3]
PROGRAMS = {"postgres", "initdb", "valkey-server"}
START_BOTH = """
import pathlib, sys, time
from services.embedded.servers import start_postgres, start_valkey
state = pathlib.Path(sys.argv[1])
servers = [start_postgres(state), start_valkey(state)]
print(*[f"{server.url} {server.pid}" for server in servers], sep="\\n", flush=True)
sys.stdin.read()
for server in servers:
    server.stop()
"""


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """Empty; below a directory that only its owner may enter."""
    with tempfile.TemporaryDirectory(prefix="ct-") as folder:
        yield Path(folder) / "state"


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Complete and stopped, shared by the tests that leave it so: initdb is most of a start's time."""
    with tempfile.TemporaryDirectory(prefix="ct-") as folder:
        state = Path(folder) / "state"
        start_postgres(state).stop()
        yield state


def copy_of(made: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", made, target], check=True)
    return target


def select(server_or_url: Server | str, statement: str = "SELECT 1") -> object:
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]


def living(state: Path) -> set[int]:
    """Every server process in any directory of the state."""
    folders = [state / name for name in ("postgres", "postgres.new", "valkey")]
    return set().union(*(running_in(folder, PROGRAMS) for folder in folders))


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def run_both(state: Path, **popen: object) -> tuple["subprocess.Popen[str]", list[str], list[int]]:
    """Another process that holds both servers until its stdin closes; their URLs and pids."""
    argv = [sys.executable, "-c", START_BOTH, str(state)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, **popen}
    holder = subprocess.Popen(options.pop("args", argv), **options)  # type: ignore[call-overload]
    lines = [holder.stdout.readline().split() for _ in range(2)]
    assert all(len(line) == 2 for line in lines), "the servers did not start"
    return holder, [line[0] for line in lines], [int(line[1]) for line in lines]


def test_both_answer_and_keep_their_data(made: Path) -> None:
    postgres, valkey = start_postgres(made), start_valkey(made)
    try:
        engine = create_engine(postgres.url)
        with engine.begin() as connection:
            assert connection.execute(text("SELECT 1")).scalar() == 1
            connection.execute(text("CREATE TABLE kept (word text)"))
            connection.execute(text("INSERT INTO kept VALUES ('größer')"))
            assert connection.execute(text("SHOW fsync")).scalar() == "on"
            assert int(connection.execute(text("SHOW max_connections")).scalar_one()) >= 100
            assert connection.execute(text("SHOW listen_addresses")).scalar() == ""
        engine.dispose()
        with closing(Redis.from_url(valkey.url)) as client:
            client.set("word", "kept")
            settings = client.config_get("*")
            assert settings["appendonly"] == "yes"
            assert settings["appendfsync"] == "everysec"
            assert settings["maxmemory-policy"] == "noeviction"
            assert settings["port"] == "0"
    finally:
        postgres.stop()
        valkey.stop()
    assert living(made) == set()
    assert not (made / "postgres" / "postmaster.pid").exists()

    again, valkey_again = start_postgres(made), start_valkey(made)
    try:
        assert (again.url, valkey_again.url) == (postgres.url, valkey.url)
        assert select(again, "SELECT word FROM kept") == "größer"
        with closing(Redis.from_url(valkey_again.url)) as client:
            assert client.get("word") == b"kept"
    finally:
        again.stop()
        valkey_again.stop()
        again.stop()  # a second stop does nothing


def test_two_side_by_side_and_the_same_directory_refused(made: Path, state_dir: Path) -> None:
    one, two = made, copy_of(made, state_dir)
    running = [start(state) for state in (one, two) for start in (start_postgres, start_valkey)]
    try:
        select(running[0], "CREATE TABLE only_here ()")
        assert select(running[2], "SELECT to_regclass('only_here')") is None
        for start in (start_postgres, start_valkey):
            with pytest.raises(Conflict, match=rf"in use by process {os.getpid()}") as refused:
                start(one)
            assert refused.value.code == "state_dir_in_use"
        assert select(running[0]) == 1  # the refusal harmed nothing
    finally:
        for server in running:
            server.stop()


def test_the_state_lock_falls_with_its_holder(tmp_path: Path) -> None:
    code = "import sys,time,pathlib\nfrom services.embedded.lock import StateLock\n"
    code += "lock = StateLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(Conflict, match=f"process {holder.pid} "):
        StateLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    StateLock(tmp_path).release()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_killing_the_holder_takes_the_servers_along(made: Path) -> None:
    holder, urls, pids = run_both(made)
    with closing(Redis.from_url(urls[1])) as client:
        client.set("written", "before the crash")
    select(urls[0], "CREATE TABLE survivor ()")
    assert set(pids) <= living(made)
    holder.kill()
    holder.communicate()
    wait_until(lambda: not living(made))
    postgres, valkey = start_postgres(made), start_valkey(made)
    try:
        assert select(postgres, "SELECT count(*) FROM survivor") == 0
        with closing(Redis.from_url(valkey.url)) as client:
            assert client.get("written") == b"before the crash"
    finally:
        postgres.stop()
        valkey.stop()


def test_killed_servers_start_again(made: Path) -> None:
    for start in (start_postgres, start_valkey):
        server = start(made)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda server=server: server.poll() is not None)  # type: ignore[misc]
        server.stop()
        assert living(made) == set()
        start(made).stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_server_nobody_holds_is_ended_first(made: Path) -> None:
    """What a crash leaves where no parent-death signal comes: the server runs, its holder and lock are gone."""
    server = start_postgres(made)
    server.cleanup.close()  # only the lock
    fresh = start_postgres(made)
    try:
        assert server.process.wait(10) == 0
        assert fresh.pid != server.pid
        assert select(fresh) == 1
    finally:
        fresh.stop()


@pytest.mark.parametrize("content", ["", "not a pid\n", "{alive}\n/elsewhere\n0\n5432\n.\n\n 1 1\nready\n"])
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_stale_pid_file_and_sockets(made: Path, content: str) -> None:
    data = made / "postgres"
    owner = data.stat()
    # The pid in the third belongs to a living program of the very user that PostgreSQL runs as.
    account = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    bystander = subprocess.Popen(["sleep", "60"], **account)  # type: ignore[call-overload]
    try:
        for name in ("postmaster.pid", ".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
            (data / name).write_text(content.format(alive=bystander.pid))
            os.chown(data / name, owner.st_uid, owner.st_gid)
        postgres = start_postgres(made)
        try:
            assert select(postgres) == 1
        finally:
            postgres.stop()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "thesis.txt").write_text("the only copy")
    with pytest.raises(Conflict, match="Nothing was deleted"):
        start_postgres(tmp_path)
    assert (tmp_path / "postgres" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_killed_in_the_middle_of_initdb_it_starts_over(state_dir: Path) -> None:
    argv = [sys.executable, "-c", START_BOTH, str(state_dir)]
    holder = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until(lambda: (state_dir / "postgres.new" / "base").exists())
    holder.kill()
    holder.communicate()
    assert (state_dir / "postgres.new").exists()
    assert not (state_dir / "postgres").exists()
    postgres = start_postgres(state_dir)
    try:
        assert select(postgres) == 1
        assert not (state_dir / "postgres.new").exists()
    finally:
        postgres.stop()


def test_long_and_odd_paths(made: Path, state_dir: Path) -> None:
    odd = state_dir.with_name("a, b?c=%41 ü " + "x" * 120)
    copy_of(made, odd)
    postgres, valkey = start_postgres(odd), start_valkey(odd)
    try:
        assert select(postgres) == 1
        with closing(Redis.from_url(valkey.url)) as client:
            assert client.ping()
        link = Path(postgres.url.partition("host=")[2])
        assert link.resolve() == (odd / "postgres").resolve()
    finally:
        postgres.stop()
        valkey.stop()
    assert not link.is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_started_from_a_thread_that_ends(state_dir: Path) -> None:
    started: list[Server] = []
    thread = Thread(target=lambda: started.append(start_valkey(state_dir)))
    thread.start()
    thread.join()
    try:
        time.sleep(0.2)
        assert started[0].poll() is None
        with closing(Redis.from_url(started[0].url)) as client:
            assert client.ping()
    finally:
        started[0].stop()


def test_a_start_that_fails_says_why_and_lets_go(made: Path, state_dir: Path) -> None:
    data = copy_of(made, state_dir) / "postgres"
    with (data / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    for _ in range(2):  # the second would be refused if the first had kept the lock
        with pytest.raises(Unavailable, match="no_such_setting"):
            start_postgres(state_dir)


@pytest.fixture
def ordinary_user() -> Iterator[pwd.struct_passwd]:
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("needs root and useradd to make another user")
    name = f"captune{os.getpid()}"
    subprocess.run(["useradd", "--create-home", "--key", "HOME_MODE=0700", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


def test_as_an_ordinary_user(ordinary_user: pwd.struct_passwd) -> None:
    account = {"user": ordinary_user.pw_uid, "group": ordinary_user.pw_gid, "extra_groups": []}
    # The environment's own interpreter may lie below a private home; the system's then runs the same code.
    python = next((p for p in (sys.executable, "/usr/bin/python3") if _runs(p, account)), None)
    if python is None:
        pytest.skip("no Python 3.11 that another user may run")
    packages = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])
    state = Path(ordinary_user.pw_dir) / "state"
    holder, urls, pids = run_both(
        state,
        args=[python, "-c", START_BOTH, str(state)],
        env={"PYTHONPATH": packages, "PATH": os.environ["PATH"]},
        cwd="/",
        **account,
    )
    try:
        assert select(urls[0]) == 1
        with closing(Redis.from_url(urls[1])) as client:
            assert client.ping()
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in pids} == {ordinary_user.pw_uid}
    finally:
        holder.communicate()
    assert holder.returncode == 0
    assert living(state) == set()
    select_as_root = start_postgres(state)  # root opens a user's directory as that user
    try:
        assert select(select_as_root) == 1
        assert Path(f"/proc/{select_as_root.pid}").stat().st_uid == ordinary_user.pw_uid
    finally:
        select_as_root.stop()


def _runs(python: str, account: dict[str, object]) -> bool:
    check = "import sys, ctypes, typing; typing.Self"
    try:
        argv = [python, "-c", check]
        return subprocess.run(argv, cwd="/", capture_output=True, **account).returncode == 0  # type: ignore[call-overload, no-any-return]
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root runs it under another account")
def test_root_whose_environment_others_can_not_enter(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone in /root: neither state nor programs can be reached by path, and no permission above them changes."""
    monkeypatch.setattr(cluster, "_open_to_all", lambda path: False)
    cache = Path(tempfile.mkdtemp(prefix="ct-cache-", dir="/var/tmp"))
    cache.chmod(0o755)
    monkeypatch.setattr(cluster, "PROGRAM_CACHE", cache)
    private = state_dir.parent
    try:
        postgres = start_postgres(state_dir)
        try:
            assert select(postgres) == 1
            assert Path(f"/proc/{postgres.pid}/exe").readlink().is_relative_to(cache)
            assert Path(f"/proc/{postgres.pid}").stat().st_uid != 0
        finally:
            postgres.stop()
        assert private.stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(cache)
