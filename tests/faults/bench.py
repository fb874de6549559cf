"""A small world to try faults on: real PostgreSQL and Valkey, and processes that do what a test tells them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, cast

from services.embedded.keeper import Keeper
from services.embedded.servers import start_postgres, start_valkey
from shared.config import CoreSettings
from shared.core import Core
from shared.db.migrate import migrate
from shared.db.models import Job
from tests.faults.inject import heal
from tests.faults.inject.base import End, Fault
from tests.faults.inject.edges import Edges
from tests.openai_server import Behaviour, OpenAIServer

if TYPE_CHECKING:
    from tests.faults.world import World

ROOT = Path(__file__).parents[2]
# Runs each line it is sent, and says what came of it; one that begins with "!" in a child, of which it says the end.
_OBEY = """
import os, sys
from shared.config import CoreSettings
from shared.core import Core
from shared.jobs import ledger
def run(line):
    try:
        return eval(line)
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'errno', '')}"
core = Core.from_settings(CoreSettings())
print("ready", flush=True)
for line in sys.stdin:
    if line[0] != "!":
        print(run(line), flush=True)
    elif child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        core = Core.from_settings(CoreSettings())
        run(line[1:])
        os._exit(0)
"""


class Process:
    """One that does as it is told; named like one of the stack's."""

    def __init__(self, name: str, env: dict[str, str]) -> None:
        self.name = name
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _OBEY],
            env={**os.environ, **env, "CAPTUNE_WORKER": name},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid

    def do(self, expression: str) -> str:
        """What it evaluates to, or its error."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(expression + "\n")
        self._popen.stdin.flush()
        return self._popen.stdout.readline().strip()

    def end_of(self, expression: str) -> signal.Signals | None:
        """What a child dies of that evaluates it; None where it lives."""
        code = int(self.do("!" + expression))
        return signal.Signals(-code) if code else None

    def started(self) -> Self:
        assert self._popen.stdout is not None
        assert self._popen.stdout.readline() == "ready\n"
        return self

    def stop(self) -> None:
        self._popen.kill()
        self._popen.communicate()

    @property
    def state(self) -> str:
        """R, S, T ... (proc_pid_stat(5))"""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]


class Models:
    def __init__(self) -> None:
        self.running = OpenAIServer()
        self.port = self.running.port
        self.running.__enter__()

    def behave(self, behaviour: Behaviour | None = None) -> None:
        self.running.otherwise = behaviour or OpenAIServer().otherwise

    def stop(self) -> None:
        self.running.stop()

    def start(self) -> None:
        if self.running.stopping.is_set():
            self.running = OpenAIServer(port=self.port)
            self.running.__enter__()


class Bench:
    """What `inject` asks of a `World`. `named`: the processes' pids, set by the tests."""

    def __init__(self, folder: Path) -> None:
        self.state_dir = folder
        self.store_dir = folder / "store"
        self.keepers = {"postgres": Keeper(start_postgres(folder)), "valkey": Keeper(start_valkey(folder))}
        self.database_url = self.keepers["postgres"].server.url
        self.redis_url = self.keepers["valkey"].server.url
        self.edges = Edges(folder / "edges")
        self.models = Models()
        self.environment = {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "STORAGE_URL": f"file://{self.store_dir}",
            **self.edges.environment(),
        }
        self.stack = SimpleNamespace(env={**os.environ, **self.environment})
        settings = CoreSettings(
            database_url=self.database_url,  # type: ignore[arg-type]
            redis_url=self.redis_url,  # type: ignore[arg-type]
            storage_url=f"file://{self.store_dir}",
        )
        self.core = Core.from_settings(settings, pool_size=3)
        migrate(self.core.db)
        started = [Process(name, self.environment) for name in ("api", "worker-ingest")]
        self.api, self.worker = (process.started() for process in started)
        self.named: dict[str, int] = {}

    def pid(self, name: str) -> int | None:
        keeper = self.keepers.get(name)
        return keeper.server.pid if keeper is not None else self.named.get(name)

    def reset(self) -> None:
        heal(cast("World", self))
        with self.core.db.transaction() as session:
            session.query(Job).delete()
        self.core.queue.redis.flushall()

    def close(self) -> None:
        self.api.stop()
        self.worker.stop()
        self.core.close()
        self.models.stop()
        for keeper in self.keepers.values():
            keeper.stop()


@contextmanager
def during(fault: Fault, world: Any, rng: Any) -> Iterator[End]:
    """The block runs while the fault lasts; it is ended twice, as it may be."""
    end = fault.begin(world, rng)
    try:
        yield end
    finally:
        end()
        end()


def soon(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
