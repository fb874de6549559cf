"""Keeps named worker processes running: starts a dead one again, and leaves none behind."""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.embedded.lock import StateLock, prepare_state_dir
from services.embedded.processes import describe_exit, end_all, in_session, marked, rotate, signal_all, spawn

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between looks at the children
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds before a dead one is started again; doubles up to the longest
STABLE = 30.0  # seconds of life after which an earlier failure counts no more


@dataclass
class _Child:
    name: str
    argv: Sequence[str]
    env: dict[str, str]
    marks: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0  # in a row
    start_at: float = 0.0

    @property
    def running(self) -> subprocess.Popen[bytes] | None:
        """The process while it lives."""
        return self.process if self.process is not None and self.process.poll() is None else None

    def start(self) -> None:
        self.process = spawn(self.argv, log_path=self.log_path, death_signal=signal.SIGKILL, env=self.env)
        self.started = time.monotonic()
        log.info("%s: started, pid %d, log %s", self.name, self.process.pid, self.log_path)

    def kill_descendants(self) -> None:
        """Ends what a dead child started: a forked job, a data loader."""
        if self.process is not None:
            leader = self.process.pid
            try:
                end_all(lambda: in_session(leader) | marked(self.marks), signal.SIGKILL, 0)
            except TimeoutError as error:  # stuck in the kernel; the rest must still be tended
                log.error("%s: %s", self.name, error)

    def tend(self) -> None:
        now = time.monotonic()
        if self.process is None:
            if now < self.start_at:
                return
            try:
                self.start()
            except OSError as error:  # out of memory or processes, log folder gone: it may pass
                self._delay(now, f"could not be started ({error})")
        elif (code := self.process.poll()) is not None:
            if now - self.started >= STABLE:
                self.failures = 0
            self.kill_descendants()
            pid, self.process = self.process.pid, None
            self._delay(now, f"(pid {pid}) {describe_exit(code)}")

    def _delay(self, now: float, why: str) -> None:
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2**self.failures)
        self.failures = min(self.failures + 1, 16)
        self.start_at = now + delay
        log.warning("%s %s; starting it again in %.1f s. Its log: %s", self.name, why, delay, self.log_path)


class Supervisor:
    """Runs processes by name, each in a session of its own with its output in `state_dir/logs/NAME.log`.

    They die with this process, however it dies; what they had started themselves is then ended by the next Supervisor
    on the same state directory. Use `stop()` in a `finally` (or `with`): `atexit` runs too late for a clean end.

    grace: seconds between SIGTERM and SIGKILL at `stop()`
    Raises Conflict while another Supervisor has this state directory.
    """

    def __init__(self, state_dir: Path, grace: float = 30.0) -> None:
        self._state_dir = prepare_state_dir(state_dir)
        self._grace = grace
        self._children: dict[str, _Child] = {}
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._state_lock = StateLock(self._state_dir, "workers.lock")
        self._marks = {"CAPTUNE_SUPERVISED": str(self._state_dir)}
        if left := end_all(lambda: marked(self._marks), signal.SIGKILL, 0):
            log.warning("killed processes %s, left by a crash", sorted(left))
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Starts `argv` and keeps it running; `env` is added to this process's environment."""
        marks = {**self._marks, "CAPTUNE_WORKER": name}
        with self._mutex:
            if self._stopping.is_set():
                raise RuntimeError("the supervisor has been stopped")
            if name in self._children:
                raise ValueError(f"{name} is already supervised")
            child = _Child(
                name=name,
                argv=tuple(argv),
                env={**os.environ, **(env or {}), **marks},
                marks=marks,
                log_path=self._state_dir / "logs" / f"{name}.log",
            )
            child.start()
            self._children[name] = child

    def pids(self) -> dict[str, int]:
        """The living children; one that waits to be started again is missing."""
        with self._mutex:
            return {name: process.pid for name, child in self._children.items() if (process := child.running)}

    def stop(self, grace: float | None = None) -> None:
        """SIGTERM to every child at once, then SIGKILL to those still there after `grace` seconds, and to all they
        started. An exception meanwhile (a second Ctrl-C) ends the waiting, not the cleaning up. Can be repeated."""
        self._stopping.set()
        try:
            self._thread.join()
            living = [process for child in self._children.values() if (process := child.running)]
            signal_all([process.pid for process in living], signal.SIGTERM)
            deadline = time.monotonic() + (self._grace if grace is None else grace)
            while time.monotonic() < deadline and any(process.poll() is None for process in living):
                time.sleep(0.02)
        finally:
            with self._mutex:
                self._kill_rest()

    def _kill_rest(self) -> None:
        for child in self._children.values():
            if process := child.running:
                log.warning("%s (pid %d) did not end on SIGTERM; killing it", child.name, process.pid)
                process.kill()
        for child in self._children.values():
            if child.process is not None:
                child.process.wait()
                child.kill_descendants()
        self._children.clear()
        self._state_lock.release()

    def _watch(self) -> None:
        while not self._stopping.wait(POLL):
            with self._mutex:
                for child in self._children.values():
                    child.tend()
                    rotate(child.log_path)
