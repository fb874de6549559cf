"""Keeps PostgreSQL or Valkey running: one that dies is started again at the same address."""

import logging
import threading
import time

from services.embedded.processes import describe_exit, log_tail, rotate
from services.embedded.servers import Server
from shared.errors import CaptuneError, Unavailable

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between looks at the server
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # before the second start in a row (the first comes at once); doubles
STABLE = 30.0  # seconds of life after which an earlier failure counts no more
MOST_FAILURES = 10  # in a row; about a minute of trying


class Keeper:
    """Of a server that runs. `given_up` says why it runs no more, once nothing more is tried."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.given_up: Unavailable | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"keeper-{server.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the server, also one that is just being started."""
        self._stopping.set()
        self.server.stop()
        self._thread.join()

    def _watch(self) -> None:
        failures, started = 0, time.monotonic()
        while not self._stopping.wait(POLL):
            if (code := self.server.poll()) is None:
                rotate(self.server.log_path)
                continue
            if time.monotonic() - started >= STABLE:
                failures = 0
            failures += 1
            if failures > MOST_FAILURES:
                self._give_up(code)
                return
            delay = 0.0 if failures == 1 else min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 2))
            name, path = self.server.name, self.server.log_path
            log.warning("%s %s; starting it again in %.1f s. Its log: %s", name, describe_exit(code), delay, path)
            if self._stopping.wait(delay):
                return
            try:
                self.server.start()
            except (CaptuneError, OSError) as error:  # OSError: out of memory or processes; it may pass
                log.warning("%s did not come back: %s", name, error)
            started = time.monotonic()

    def _give_up(self, code: int) -> None:
        name, path = self.server.name, self.server.log_path
        self.given_up = Unavailable(
            f"{name} {describe_exit(code)} and did not stay up when it was started again {MOST_FAILURES} times; start "
            f"Captune again when the cause is mended. {path} ends:\n{log_tail(path)}"
        )
        log.error("%s", self.given_up.message)
