"""Who sends how much where: a limit for each server that adapts, the load shared out, the broken ones set aside.

Each server's limit follows AIMD (additive increase, multiplicative decrease; Chiu and Jain 1989): halved when the
server says that it is busy or becomes far slower than it was, raised by one for each window of successes.
"""

import logging
import math
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from services.captioner.engines.openai_replies import Verdict
from shared.errors import Unavailable

logger = logging.getLogger(__name__)

_FAILURES = 3  # in a row, after which a server that answers badly is set aside
_FIRST_REST_S, _LONGEST_REST_S = 0.5, 30.0
_LONGEST_RETRY_AFTER_S = 600.0  # a clock that is wrong must not stop a server for days
_USUAL, _RECENT = 64, 8  # latencies compared: medians of so many, the newer against the older
_FAR_ABOVE, _NOTICEABLE_S = 3.0, 0.1  # times as slow, and by so much


@dataclass(eq=False)
class Server:
    """One base URL. Everything but `url`, `label` and `limit_field` belongs to `Servers` and its lock."""

    url: str
    label: str  # host and port, for messages
    limit: int
    limit_field: str = "max_tokens"  # some want "max_completion_tokens" and say so
    in_flight: int = 0
    given_at: float = 0.0  # when it last got a request
    rest_until: float = 0.0
    down: bool = False  # set aside; after its rest one request at a time finds out whether it is back
    probing: bool = False
    trouble: str = ""  # what went wrong last
    failures: int = 0  # in a row
    falls: int = 0  # times set aside since the last success
    cuts: int = 0  # of the limit since the last success
    cut_at: float = 0.0
    back_at: float = 0.0
    successes: int = 0  # in this window
    usual: deque[float] = field(default_factory=lambda: deque(maxlen=_USUAL))  # seconds
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass(frozen=True)
class Lease:
    """The right to send one request to a server. `probe`: it was set aside, so see first whether it is there."""

    server: Server
    probe: bool
    started: float


@dataclass(eq=False)
class _Waiter:
    tried: Collection[Server]
    ready: threading.Condition
    server: Server | None = None
    probe: bool = False  # as granted; whether the server is probed may have changed by the time the waiter wakes up


class Servers:
    """Hands out leases, first come first served. `addresses`: {URL: label}. `concurrency`: most requests in
    flight, over all servers."""

    def __init__(self, engine: str, addresses: Mapping[str, str], concurrency: int) -> None:
        share = math.ceil(concurrency / len(addresses))
        self.all = [Server(url, label, limit=share) for url, label in addresses.items()]
        self._engine = engine
        self._concurrency = concurrency
        self._in_flight = 0
        self._lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()

    def acquire(self, deadline: float, tried: Collection[Server] = ()) -> Lease:
        """Waits for a free place, rather on a server not yet `tried`, until `deadline` (time.monotonic()).
        Raises Unavailable as soon as it is clear that none comes in time."""
        waiter = _Waiter(tried, threading.Condition(self._lock))
        with self._lock:
            self._waiters.append(waiter)
            self._grant()
            while waiter.server is None:
                now = time.monotonic()
                back = min(server.rest_until for server in self.all)
                if now >= deadline or back > deadline:
                    self._waiters.remove(waiter)
                    raise self._none_in_time(back - now)
                rests = [server.rest_until for server in self.all if server.rest_until > now]
                waiter.ready.wait(min([deadline, *rests]) - now)
                self._grant()
            return Lease(waiter.server, waiter.probe, time.monotonic())

    def release(self, lease: Lease, verdict: Verdict, why: str = "", retry_after: float | None = None) -> None:
        """Ends a lease and draws the consequences. `why` is shown to users where no server is left."""
        server, now = lease.server, time.monotonic()
        with self._lock:
            server.in_flight -= 1
            self._in_flight -= 1
            if lease.probe:
                server.probing = False
                if verdict in ("ok", "refused", "busy"):
                    self._bring_back(server)
                else:
                    self._set_aside(server, why)
            if why:
                server.trouble = why
            if verdict == "ok":
                self._note_success(server, lease.started, now - lease.started)
            elif verdict == "refused":
                server.failures = 0
            elif verdict == "busy":
                self._note_busy(server, lease.started, retry_after)
            elif not server.down and lease.started >= server.back_at:
                self._note_failure(server, lease.started, verdict, why)
            self._grant()

    def another_stands(self, tried: Collection[Server]) -> bool:
        """Whether a request that none of the `tried` servers can serve has somewhere to go."""
        with self._lock:
            return any(not server.down and server not in tried for server in self.all)

    def set_aside(self, server: Server, why: str) -> None:
        """Keep a server from getting requests until a probe finds it well."""
        with self._lock:
            server.trouble = why
            self._set_aside(server, why)

    # All below is called with the lock held.

    def _grant(self) -> None:
        while self._waiters and self._in_flight < self._concurrency:
            server = self._best(self._waiters[0].tried)
            if server is None:
                return
            server.in_flight += 1
            server.given_at = time.monotonic()
            server.probing = server.down
            self._in_flight += 1
            waiter = self._waiters.popleft()
            waiter.server, waiter.probe = server, server.probing
            waiter.ready.notify()

    def _best(self, tried: Collection[Server]) -> Server | None:
        """A server whose rest is over comes first (else it would never be looked at again), then the least loaded."""
        now = time.monotonic()
        free = [
            server
            for server in self.all
            if server.rest_until <= now and not server.probing and (server.down or server.in_flight < server.limit)
        ]
        return min(
            free,
            key=lambda server: (
                server in tried,
                not server.down,
                (server.in_flight + 1) / server.limit,
                server.given_at,
            ),
            default=None,
        )

    def _note_success(self, server: Server, started: float, seconds: float) -> None:
        server.failures = server.falls = server.cuts = 0
        server.usual.append(seconds)
        if started >= server.cut_at:
            server.recent.append(seconds)
        if _far_slower(server):
            self._cut(server, started, "it became far slower")
            return
        server.successes += 1
        if server.successes >= server.limit:
            server.successes = 0
            server.limit = min(server.limit + 1, self._concurrency)

    def _note_busy(self, server: Server, started: float, retry_after: float | None) -> None:
        cut = self._cut(server, started, "it is busy")
        if retry_after is not None:
            # A little later than asked, each server differently: never earlier, and not all at the same moment.
            rest = min(retry_after, _LONGEST_RETRY_AFTER_S) * random.uniform(1.0, 1.1)
        elif cut and server.cuts > 1:  # less was not enough
            rest = _rest(server.cuts)
        else:
            return
        server.rest_until = max(server.rest_until, time.monotonic() + rest)

    def _note_failure(self, server: Server, started: float, verdict: Verdict, why: str) -> None:
        if verdict == "slow":
            self._cut(server, started, "it did not answer in time")
        if verdict == "misplaced":
            # With nowhere else to go, each request rather hears the reason than waits.
            if any(other is not server and not other.down for other in self.all):
                self._set_aside(server, why)
            return
        server.failures += 1
        if verdict == "down" or server.failures >= _FAILURES:
            self._set_aside(server, why)

    def _cut(self, server: Server, started: float, why: str) -> bool:
        """Once a window: what was sent before the last cut says nothing of the limit since."""
        if started < server.cut_at:
            return False
        server.limit = max(1, server.limit // 2)
        server.cut_at, server.successes = time.monotonic(), 0
        server.cuts += 1
        server.recent.clear()
        logger.info("engine %s: at most %d requests at a time to %s: %s", self._engine, server.limit, server.label, why)
        return True

    def _set_aside(self, server: Server, why: str) -> None:
        server.falls += 1
        server.down, server.failures = True, 0
        rest = _rest(server.falls)
        server.rest_until = max(server.rest_until, time.monotonic() + rest)
        logger.warning("engine %s: %s is set aside for %.1f s: it %s", self._engine, server.label, rest, why)

    def _bring_back(self, server: Server) -> None:
        server.down, server.back_at = False, time.monotonic()
        logger.info("engine %s: %s is back", self._engine, server.label)

    def _none_in_time(self, wait: float) -> Unavailable:
        troubles = "; ".join(f"{server.label} {server.trouble}" for server in self.all if server.trouble)
        return Unavailable(
            f"Engine {self._engine!r}: no model server is free in time ({troubles or 'all are full'}). "
            "Check that they run; requests are taken again as soon as one answers.",
            code="no_model_server",
            retry_after=max(1, math.ceil(wait)),
        )


def _far_slower(server: Server) -> bool:
    if len(server.recent) < _RECENT or len(server.usual) < _USUAL // 2:
        return False
    recent, usual = statistics.median(server.recent), statistics.median(server.usual)
    return recent > max(_FAR_ABOVE * usual, usual + _NOTICEABLE_S)


def _rest(times: int) -> float:
    """Exponential back-off with jitter, in seconds."""
    return float(min(_LONGEST_REST_S, _FIRST_REST_S * 2 ** min(times - 1, 10)) * random.uniform(0.5, 1.0))
