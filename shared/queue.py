"""The wake-up call: Redis lists through RQ, carrying job ids and nothing else. Losing all of Redis loses no job.

RQ's payload is JSON, and what a worker runs for it is fixed in the worker (shared/jobs/worker.py): a forged payload
can at most name a job id."""

import logging
import time
from typing import cast
from uuid import uuid4

from redis import Redis, RedisError
from redis.backoff import ExponentialBackoff
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

#: One queue, and one kind of worker, each; and what users call such a job.
KINDS = {"ingest": "data set", "caption": "caption job", "fine_tune": "fine-tuning job", "evaluate": "evaluation"}

FUNCTION = "captune.job"  # RQ wants a name; workers run one thing, whatever it says

log = logging.getLogger(__name__)


UNHEARD_SECONDS = 5.0  # after no answer came, Redis is left alone for so long: requests must not queue up before it


def connect(url: str) -> Redis:
    """A call takes 6 s at most, whatever becomes of the server. (A worker's wait for a job has a limit of its own.)"""
    return Redis.from_url(
        url,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 1),
        socket_connect_timeout=2,
        socket_timeout=3,
    )


def ledger_id(wake_up: str) -> str:
    """The job that a wake-up is for."""
    return wake_up.rpartition("-")[0]


def _types_of(queue: Queue) -> dict[str, bytes]:
    """The keys that RQ uses for a queue and its workers, each with its type."""
    registries = ("wip", "finished", "failed", "deferred", "ready", "scheduled", "canceled")
    return {
        queue.key: b"list",
        queue.intermediate_queue_key: b"list",
        queue.registry_cleaning_key: b"string",
        f"rq:workers:{queue.name}": b"set",
        "rq:workers": b"set",
        "rq:queues": b"set",
        **{f"rq:{registry}:{queue.name}": b"zset" for registry in registries},
    }


class JobQueue:
    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._queues = {kind: Queue(kind, connection=redis, serializer=JSONSerializer) for kind in KINDS}
        self._unheard_until = 0.0

    def enqueue(self, kind: str, job_id: str) -> bool:
        """Tell a worker. False when Redis did not take it: the reconciler will try again, nothing is lost."""
        if time.monotonic() < self._unheard_until:
            return False
        wake_up = f"{job_id}-{uuid4().hex[:8]}"  # one of its own each time: RQ deletes a payload when its run ends
        try:
            self._queues[kind].enqueue(FUNCTION, job_id=wake_up, job_timeout=-1, result_ttl=0, failure_ttl=60)
        except RedisError as error:
            if isinstance(error, RedisTimeout):
                self._unheard_until = time.monotonic() + UNHEARD_SECONDS
            log.warning("enqueue failed, the reconciler will retry", extra={"job_id": job_id, "error": str(error)})
            return False
        return True

    def waiting(self, kind: str) -> set[str]:
        """Ids of the jobs on the kind's list, and whatever else somebody has put there."""
        found = cast("list[bytes]", self.redis.lrange(self._queues[kind].key, 0, -1))
        return {ledger_id(wake_up.decode(errors="replace")) for wake_up in found}

    def mend(self) -> list[str]:
        """Deletes what stands where RQ's own keys do and is of another type, which RQ would stumble over for ever.
        Returns their names. Nothing of value is lost: what is queued is in the ledger."""
        types = {key: kind for queue in self._queues.values() for key, kind in _types_of(queue).items()}
        with self.redis.pipeline(transaction=False) as pipe:
            for key in types:
                pipe.type(key)
            found = dict(zip(types, pipe.execute(), strict=True))
        wrong = [key for key, kind in found.items() if kind not in (b"none", types[key])]
        if wrong:
            self.redis.delete(*wrong)
        return wrong

    def depth(self, kind: str) -> int:
        return self._queues[kind].count

    def ping(self) -> None:
        self.redis.ping()
