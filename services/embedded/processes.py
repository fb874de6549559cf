"""Child processes that cannot outlive this one, and the search for those that a crash left behind."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from services.embedded import launch

log = logging.getLogger(__name__)

MAX_LOG_BYTES = 50 * 2**20
PROC = Path("/proc")

# Linux sends the parent-death signal when the *thread* that forked ends. This one lives as long as the interpreter,
# so that children may be started from any thread. (No thread is made before the first use.)
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(
    argv: Sequence[str],
    *,
    log_path: Path,
    death_signal: signal.Signals,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    account: tuple[int, int] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `argv` in a session of its own (a terminal's Ctrl-C does not reach it), output appended to `log_path`.

    cwd: entered before privileges are dropped, so the account need not be able to reach it by its path
    env: the whole environment; this process's own where it is None
    account: (uid, gid) to run as
    death_signal: what the child gets when this process dies, however it dies (Linux)
    """
    user = "-" if account is None else f"{account[0]}:{account[1]}"
    shim = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(death_signal)), user]

    def start() -> subprocess.Popen[bytes]:
        rotate(log_path)
        with log_path.open("ab") as output:
            return subprocess.Popen(
                [*shim, *argv],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    return _spawner.submit(start).result()


def rotate(path: Path) -> None:
    """Copies a log that has grown past MAX_LOG_BYTES to NAME.log.1, over the one kept before, and empties it: its
    program has it open, to append. (What is written between the two is lost, and all of it on a full disk.)"""
    with suppress(FileNotFoundError):
        if path.stat().st_size > MAX_LOG_BYTES:
            with suppress(OSError):
                shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for the error that says why its program did not start."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def describe_exit(code: int) -> str:
    """`Popen.returncode` in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def signal_all(pids: Collection[int], number: signal.Signals) -> None:
    """Sends a signal to each, leaving out those already gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(find: Callable[[], set[int]], first: signal.Signals, patience: float) -> set[int]:
    """Ends every process that `find` names: `first`, up to `patience` seconds, then SIGKILL. Returns who they were.

    `find` is asked again until it names none, so what they start meanwhile is ended too.
    """
    seen: set[int] = set()
    deadline = time.monotonic() + patience
    while pids := find():
        if time.monotonic() >= deadline:
            signal_all(pids, signal.SIGKILL)
        elif new := pids - seen:
            signal_all(new, first)
        seen |= pids
        for pid in pids:  # orphans are this process's to reap where it is a container's first process
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= deadline + 10:
            raise TimeoutError(f"processes {sorted(pids)} don't end, not even on SIGKILL")
        time.sleep(0.02)
    return seen


def running_in(directory: Path, programs: Collection[str]) -> set[int]:
    """Pids of the processes of these names whose working directory is `directory`. Linux; empty elsewhere.

    Servers stay in their data directory all their lives, so this finds them whatever a stale pid file says.
    """
    try:
        home = directory.stat()
    except FileNotFoundError:
        return set()
    found = set()
    for process in _processes():
        with suppress(OSError):  # ended meanwhile, or another user's
            if (process / "comm").read_text().strip() in programs:
                cwd = (process / "cwd").stat()
                if (cwd.st_dev, cwd.st_ino) == (home.st_dev, home.st_ino):
                    found.add(int(process.name))
    return found


def marked(marks: Mapping[str, str]) -> set[int]:
    """Pids of the processes, other than this one, that have all `marks` in their environment. Linux; empty elsewhere.

    Environment is inherited, so children's children are found however they changed their session or lost a parent.
    """
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    found = set()
    for process in _processes():
        with suppress(OSError):
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                found.add(int(process.name))
    return found - {os.getpid()}


def in_session(leader: int) -> set[int]:
    """Pids of the living processes in `leader`'s session. Linux; empty elsewhere."""
    found = set()
    for process in _processes():
        with suppress(OSError):
            # After the name, which may hold anything: state, parent, group, session (proc_pid_stat(5)).
            state, _, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(session) == leader and state not in "ZX":
                found.add(int(process.name))
    return found


def _processes() -> Iterator[Path]:
    return (entry for entry in PROC.iterdir() if entry.name.isdigit()) if PROC.is_dir() else iter(())
