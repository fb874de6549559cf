"""`captune up`: the whole system on one machine, from one command.

Starts a PostgreSQL and a Valkey for what no setting names, migrates, then supervises the API process, one worker per
queue, the reconciler and the collector: the same programs that docker-compose.yml runs."""

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx

from captune.connection import FILE as CONNECTION_FILE
from services.embedded.keeper import Keeper
from services.embedded.lock import prepare_state_dir
from services.embedded.processes import log_tail
from services.embedded.servers import start_postgres, start_valkey
from services.embedded.supervisor import Supervisor
from shared.db.migrate import migrate
from shared.db.session import Database
from shared.errors import Conflict, Unavailable
from shared.queue import KINDS
from shared.web.auth import ensure_key, new_secret

READY_SECONDS = 180.0
MODEL_SECONDS = 60.0  # the default caption model needs about five
OWNER = "local"


class Stack:
    """A running system. Use as a context manager, or call `stop()`.

    port: 0 chooses a free one. env: settings for the processes, over this process's environment.
    Raises Conflict where the port or the state directory is taken, Unavailable where something does not start."""

    def __init__(
        self,
        state_dir: Path,
        *,
        port: int = 8000,
        env: dict[str, str] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.state_dir = prepare_state_dir(state_dir)
        self._say = say
        self._undo = ExitStack()
        self._keepers: list[Keeper] = []
        try:
            self._start(port, env or {})
        except BaseException:
            self._undo.close()
            raise

    def _start(self, port: int, extra: dict[str, str]) -> None:
        given = {**os.environ, **extra}
        port = _free_port(port)
        self.url = f"http://127.0.0.1:{port}"
        env = dict(extra)
        for name, start in (("DATABASE_URL", start_postgres), ("REDIS_URL", start_valkey)):
            if name not in given:
                self._say(f"starting {'PostgreSQL' if name == 'DATABASE_URL' else 'Valkey'}")
                keeper = Keeper(start(self.state_dir))
                self._keepers.append(keeper)
                self._undo.callback(keeper.stop)
                env[name] = keeper.server.url
        env.setdefault("STORAGE_URL", given.get("STORAGE_URL", f"file://{self.state_dir / 'store'}"))
        # Of this run, and held in memory only, unless the operator names one.
        env.setdefault("CAPTUNE_SERVICE_TOKEN", given.get("CAPTUNE_SERVICE_TOKEN") or secrets.token_urlsafe(32))
        env.setdefault("CAPTUNE_CAPTIONER_URL", given.get("CAPTUNE_CAPTIONER_URL", self.url))
        env.setdefault("PYTHONUNBUFFERED", "1")
        # glibc gives threads that come and go up to 8 heaps a core, each of which keeps what it once grew to.
        env.setdefault("MALLOC_ARENA_MAX", given.get("MALLOC_ARENA_MAX", "2"))
        env["CAPTUNE_METRICS_PORT"] = "0"  # one port cannot be that of each worker
        self.env = {**given, **env}

        self._say("preparing the database")
        database = Database(self.env["DATABASE_URL"])
        migrate(database)
        self.api_key = stored_key(database, self._remember_key(), self._say)
        database.close()

        self.supervisor = Supervisor(self.state_dir)
        self._undo.callback(self.supervisor.stop)
        python = sys.executable
        api = ["-m", "shared.web.serve", "services.embedded.api:create_app", "--port", str(port), "--grace", "5"]
        self.supervisor.add("api", [python, *api], env)
        for kind in KINDS:
            self.supervisor.add(f"worker-{kind}", [python, "-m", "shared.jobs.worker", kind], env)
        self.supervisor.add("reconciler", [python, "-m", "shared.jobs.reconciler"], env)
        self._await_ready()
        self.supervisor.add("collector", [python, "-m", "shared.store.collector"], env)
        self._write_connection()

    def _remember_key(self) -> str:
        """The key of the first start, so that clients go on working after a restart."""
        try:
            return str(json.loads((self.state_dir / CONNECTION_FILE).read_text())["api_key"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return new_secret()

    def _write_connection(self) -> None:
        path = self.state_dir / CONNECTION_FILE
        temporary = path.with_suffix(".part")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"url": self.url, "api_key": self.api_key}, file)
        os.replace(temporary, path)

    def _await_ready(self) -> None:
        """Until everything answers. A caption model that takes longer (a download) goes on loading: its jobs wait."""
        self._say("starting the services and loading the caption model")
        began = time.monotonic()
        state = "no answer"
        while time.monotonic() < began + READY_SECONDS:
            self.check()
            try:
                answer = httpx.get(f"{self.url}/readyz", timeout=5.0, trust_env=False)  # never through a proxy
            except httpx.TransportError:
                time.sleep(0.2)
                continue
            if answer.is_success:
                return
            state = answer.text
            waiting = {name for name, found in answer.json()["checks"].items() if found != "ok"}
            if waiting == {"model"} and time.monotonic() > began + MODEL_SECONDS:
                return self._say(f"the caption model is not ready yet, see {self.url}/readyz")
            time.sleep(0.2)
        log = self.state_dir / "logs" / "api.log"
        raise Unavailable(f"the API was not ready within {READY_SECONDS:.0f} s ({state}). {log} ends:\n{log_tail(log)}")

    def check(self) -> None:
        """Raises Unavailable where PostgreSQL or Valkey died again and again: nothing can be done without them."""
        for keeper in self._keepers:
            if keeper.given_up is not None:
                raise keeper.given_up

    def pids(self) -> dict[str, int]:
        """The living processes by name, `postgres` and `valkey` too where they are this stack's own. One that waits to
        be started again is missing."""
        own = {keeper.server.name: keeper.server for keeper in self._keepers}
        servers = {name: server.pid for name, server in own.items() if server.poll() is None}
        return self.supervisor.pids() | servers

    def stop(self) -> None:
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def docs_url(url: str) -> str | None:
    """Where the API's documentation is, unless `CAPTUNE_DOCS=off` closed it. The server is asked: it may have been
    started with other settings than this process has."""
    page = f"{url}/docs"
    try:
        return page if httpx.get(page, timeout=5.0, trust_env=False).is_success else None
    except httpx.TransportError:
        return None


def stored_key(database: Database, key: str, say: Callable[[str], None]) -> str:
    """`key`, stored; or another where it was revoked."""
    with database.transaction() as session:
        if not ensure_key(session, key, owner=OWNER, name="captune up"):
            say(f"the API key in {CONNECTION_FILE} was revoked or has expired: making another")
            key = new_secret()
            ensure_key(session, key, owner=OWNER, name="captune up")
    return key


def _free_port(port: int) -> int:
    """`port` if it can be bound, or a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise Conflict(
                f"port {port} is in use; stop what uses it, or choose another: captune up --port {port + 1}"
            ) from None
        return int(probe.getsockname()[1])
