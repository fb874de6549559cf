"""What can become of Redis: gone, forgetful, full, silent, or hanging up."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.faults.inject.base import End, Fault, nothing, send

if TYPE_CHECKING:
    from tests.faults.world import World

PAUSE_SECONDS = 3.0
BRIEFLY, PATIENTLY = 1.0, 10.0  # seconds, for a server that another fault keeps from answering


def asked(world: "World", command: Callable[[Redis], object], seconds: float = BRIEFLY) -> bool:
    """On a connection of its own, once the server takes it. False where it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        options = {"socket_timeout": 1, "socket_connect_timeout": 1, "retry": Retry(NoBackoff(), 0)}
        with closing(Redis.from_url(world.redis_url, **options)) as client:
            try:
                command(client)
                return True
            except RedisError:
                if time.monotonic() > deadline:
                    return False
        time.sleep(0.1)


def _kill(world: "World", rng: random.Random) -> End:
    """It is started again with what its append-only file has: the last second may be missing."""
    send(world.pid("valkey"), signal.SIGKILL)
    return nothing


def _term(world: "World", rng: random.Random) -> End:
    send(world.pid("valkey"), signal.SIGTERM)
    return nothing


def _flush(world: "World", rng: random.Random) -> End:
    asked(world, lambda client: client.flushall())
    return nothing


def _fill(world: "World", rng: random.Random) -> End:
    """Every command that would use memory is refused; what is stored is kept (`noeviction`)."""
    asked(world, lambda client: client.config_set("maxmemory", 1))
    return lambda: empty(world)


def empty(world: "World", seconds: float = 3 * BRIEFLY) -> None:
    """A server that was started again meanwhile is empty by itself."""
    asked(world, lambda client: client.config_set("maxmemory", 0), seconds)


def _pause(world: "World", rng: random.Random) -> End:
    """No command is answered, CLIENT UNPAUSE among them: it ends by itself."""
    asked(world, lambda client: client.client_pause(round(1000 * PAUSE_SECONDS)))
    return nothing


def _hang_up(world: "World", rng: random.Random) -> End:
    def kill(client: Redis) -> None:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)

    asked(world, kill)
    return nothing


FAULTS = [
    Fault("redis_killed", "redis", (0, 0), _kill),
    Fault("redis_terminated", "redis", (0, 0), _term),
    Fault("redis_flushall", "redis", (0, 0), _flush),
    Fault("redis_oom", "redis", (1.0, 5.0), _fill),
    Fault("redis_pause", "redis", (PAUSE_SECONDS, PAUSE_SECONDS), _pause),
    Fault("redis_connections", "redis", (0, 0), _hang_up),
]
