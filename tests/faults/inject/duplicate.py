"""Wake-ups that nobody should trust: repeated, for another kind of worker, for jobs that don't exist, forged, garbled.
Whoever reaches Redis can write them."""

import json
import pickle
import random
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
from redis import Redis

from shared.queue import KINDS, JobQueue
from tests.faults.inject.base import End, Fault, nothing
from tests.faults.inject.postgres import connect
from tests.faults.inject.redis import asked

if TYPE_CHECKING:
    from tests.faults.world import World


def forged_marker(world: "World") -> Path:
    """Exists if a worker ever ran what a payload names."""
    return world.edges.directory / "forged"


def _known(world: "World", rng: random.Random, *statuses: str) -> tuple[str, str] | None:
    """The kind and id of some job in one of these states."""
    try:
        with connect(world) as connection:
            query = "SELECT kind, id FROM jobs WHERE status = ANY(%s) ORDER BY id"
            rows: list[tuple[str, str]] = connection.execute(query, (list(statuses),)).fetchall()
    except psycopg.OperationalError:  # another fault has the server
        return None
    return rng.choice(rows) if rows else None


def _enqueue(world: "World", kind: str, job_id: str, times: int = 1) -> None:
    def push(client: Redis) -> None:
        for _ in range(times):
            JobQueue(client).enqueue(kind, job_id)

    asked(world, push)


def _twice(world: "World", rng: random.Random) -> End:
    if found := _known(world, rng, "queued", "running"):
        _enqueue(world, *found, times=3)
    return nothing


def _done(world: "World", rng: random.Random) -> End:
    if found := _known(world, rng, "succeeded", "failed", "cancelled", "paused"):
        _enqueue(world, *found)
    return nothing


def _wrong_queue(world: "World", rng: random.Random) -> End:
    if found := _known(world, rng, "queued", "running"):
        kind, job_id = found
        _enqueue(world, rng.choice([other for other in KINDS if other != kind]), job_id)
    return nothing


def _unknown(world: "World", rng: random.Random) -> End:
    for job_id in (f"ft_{rng.randbytes(8).hex()}", "", "-", "x" * 10_000):
        _enqueue(world, rng.choice(list(KINDS)), job_id)
    return nothing


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def forge(client: Redis, kind: str, marker: Path) -> None:
    """Payloads that would run code in a worker that believes them, each on the kind's list."""
    touch = [["touch", str(marker)]]
    call = zlib.compress(json.dumps(["subprocess.run", None, touch, {}]).encode())
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    plain = {"created_at": now, "enqueued_at": now, "origin": kind, "status": "queued", "timeout": "60"}
    hooks = {f"{when}_callback_name": "subprocess.run" for when in ("success", "failure", "stopped")}
    payloads: list[dict[Any, Any]] = [
        {**plain, "data": call, "description": "run"},
        {**plain, "data": call, **hooks, "meta": "not JSON"},
        {**plain, "data": pickle.dumps(_Touch(marker)), "description": "pickle"},
        {**plain, "data": zlib.compress(pickle.dumps(_Touch(marker)))},
        {"data": b"\xff\xfe", "created_at": "yesterday", "timeout": "soon", "status": "no such"},
        {"nothing": "of RQ's"},
    ]
    names = ("'; DROP TABLE jobs; --", "../../etc/passwd", "a:b", "\x00", "{0.__class__}", "%s%n")
    for payload, prefix in zip(payloads, names, strict=True):
        name = f"{prefix}-{uuid4().hex}"
        client.hset(f"rq:job:{name}", mapping=payload)
        client.expire(f"rq:job:{name}", 60)
        client.rpush(f"rq:queue:{kind}", name)
    name = f"forged-{uuid4().hex}"
    client.set(f"rq:job:{name}", "a string, where RQ wants a hash", ex=60)
    client.rpush(f"rq:queue:{kind}", name, b"\xff\xfe not UTF-8", "no hash anywhere", "")


def _forged(world: "World", rng: random.Random) -> End:
    kind = rng.choice(list(KINDS))
    asked(world, lambda client: forge(client, kind, forged_marker(world)))
    return nothing


FAULTS = [
    Fault("duplicate_delivery", "duplicate", (0, 0), _twice),
    Fault("delivery_of_a_finished_job", "duplicate", (0, 0), _done),
    Fault("wrong_queue", "duplicate", (0, 0), _wrong_queue),
    Fault("unknown_job", "duplicate", (0, 0), _unknown),
    Fault("forged_payload", "duplicate", (0, 0), _forged),
]
