"""How often a key may ask, and how often an address may show a wrong one: counted in Redis, so for all processes.

The count is a fixed window's: within any one window at most the limit passes, so across the border of two at most twice
that. Without Redis nothing is refused: an outage of the queue must not close the API."""

import logging
import math
import time
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from threading import Lock

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.errors import TooBusy

log = logging.getLogger(__name__)

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
REDIS_SECONDS = 0.25  # longer than that no request waits for its count
AWAY_SECONDS = 5.0  # how long Redis is left alone after it failed
REMEMBERED = 10_000  # refusals, and keys known to be good, in this process

# One round trip: the count of the window that is open, and the milliseconds it stays so.
_COUNT = """
redis.call('SET', KEYS[1], 0, 'EX', ARGV[1], 'NX')
return {redis.call('INCR', KEYS[1]), redis.call('PTTL', KEYS[1])}
"""


@dataclass(frozen=True)
class Limit:
    amount: int
    seconds: int

    @classmethod
    def parse(cls, text: str) -> "Limit | None":
        """`600/second` (or minute, hour, day); None for `off`. What `shared.schemas.keys.RateLimit` lets through."""
        if text == "off":
            return None
        amount, _, unit = text.partition("/")
        return cls(int(amount), SECONDS[unit])


class Counter:
    """Counts in Redis. A refusal is remembered here until its window ends, so a flood of one costs Redis nothing."""

    def __init__(self, redis_url: str) -> None:
        self._redis = Redis.from_url(
            redis_url,
            socket_connect_timeout=REDIS_SECONDS,
            socket_timeout=REDIS_SECONDS,
            retry=Retry(NoBackoff(), 0),  # (a connection that was closed meanwhile is opened again all the same)
        )
        self._count = self._redis.register_script(_COUNT)
        self._refused: dict[str, float] = {}  # until when, by time.monotonic()
        self._ask_again = 0.0
        self._away = False
        self._lock = Lock()

    def refused(self, name: str) -> int:
        """Seconds for which `name` stays refused, as far as this process knows; 0: it is not."""
        until = self._refused.get(name)
        if until is None:
            return 0
        left = until - time.monotonic()
        if left <= 0:
            with self._lock:
                self._refused.pop(name, None)
            return 0
        return math.ceil(left)

    def hit(self, name: str, limit: Limit) -> int:
        """Counts one; the seconds to wait where that is too many, else 0."""
        if wait := self.refused(name):
            return wait
        if not self._may_ask():
            return 0
        try:
            count, milliseconds = self._count([f"captune:rate:{name}"], [limit.seconds])
        except RedisError as error:
            self._failed(error)
            return 0
        self._answered()
        if count <= limit.amount:
            return 0
        left: float = max(milliseconds, 1) / 1000
        with self._lock:
            while len(self._refused) >= REMEMBERED:  # the oldest first
                del self._refused[next(iter(self._refused))]
            self._refused[name] = time.monotonic() + left
        return math.ceil(left)

    def close(self) -> None:
        self._redis.close()

    def _may_ask(self) -> bool:
        """Of the requests at hand, one finds out whether Redis is back; the others do not wait for it."""
        if not self._away:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._ask_again:
                return False
            self._ask_again = now + AWAY_SECONDS
            return True

    def _failed(self, error: RedisError) -> None:
        with self._lock:
            first, self._away = not self._away, True
            self._ask_again = time.monotonic() + AWAY_SECONDS
        if first:
            log.warning("Redis does not answer: requests are not limited", extra={"error": str(error)})

    def _answered(self) -> None:
        if self._away:
            with self._lock:
                back, self._away = self._away, False
            if back:
                log.warning("Redis answers again: requests are limited")


class RateLimits:
    """What `authenticate` asks. Raises TooBusy (429) with the seconds to wait."""

    def __init__(self, redis_url: str, per_key: str, failures: str) -> None:
        self._counter = Counter(redis_url)
        self._per_key, self._failures = Limit.parse(per_key), Limit.parse(failures)
        self._known: dict[str, None] = {}  # hashes of keys that were good when last shown
        self._lock = Lock()

    def count(self, key_id: str, override: str | None) -> None:
        """A request with a good key. `override`: the key's own limit."""
        limit = self._per_key if override is None else Limit.parse(override)
        if limit is not None and (wait := self._counter.hit(f"key:{key_id}", limit)):
            raise TooBusy(
                f"this key may make {limit.amount} requests in {limit.seconds} s; wait {wait} s, or ask an admin for "
                "a key with a higher rate_limit",
                code="rate_limited",
                retry_after=wait,
            )

    def check_address(self, host: str | None, key_hash: str) -> None:
        """Before the database is asked. Many clients may share an address with one that guesses (a proxy, an office):
        keys that were good before still pass."""
        if key_hash not in self._known and (wait := self._counter.refused(_address(host))):
            raise _too_many_failures(wait)

    def succeeded(self, key_hash: str) -> None:
        if key_hash not in self._known:
            with self._lock:
                while len(self._known) >= REMEMBERED:  # the oldest first
                    del self._known[next(iter(self._known))]
                self._known[key_hash] = None

    def failed(self, host: str | None, key_hash: str) -> None:
        """A wrong key was shown."""
        with self._lock:
            self._known.pop(key_hash, None)
        if self._failures is not None and (wait := self._counter.hit(_address(host), self._failures)):
            raise _too_many_failures(wait)

    def close(self) -> None:
        self._counter.close()


def _too_many_failures(wait: int) -> TooBusy:
    return TooBusy(
        f"too many requests with a wrong API key came from your address; mend the key, then wait {wait} s",
        code="too_many_failures",
        retry_after=wait,
    )


def _address(host: str | None) -> str:
    """What one client is counted under: an IPv4 address, or an IPv6 /64, of which one client may have every address."""
    try:
        address = ip_address(host or "")
    except ValueError:
        return f"address:{host}"  # a unix socket, a test
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return f"address:{address.ipv4_mapped}"
        return f"address:{address.packed[:8].hex()}"
    return f"address:{address}"
