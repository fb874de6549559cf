"""Redis can be reached by somebody who should not: what they write runs no code, ends no worker for good, and loses no
job. (Payloads one by one: also tests/integration/test_worker_process.py. While they keep at it they can of course hold
jobs up: Redis needs its password, and a network of its own.)"""

import json
import zlib
from collections.abc import Callable
from subprocess import Popen

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from shared.core import Core
from shared.jobs import reconciler
from shared.queue import KINDS
from tests.integration.factories import add_job, read_job, types_of
from tests.integration.support import wait_for
from tests.integration.test_worker_process import new_dataset

Spawn = Callable[..., Popen[bytes]]


def done(core: Core, dataset: str) -> bool:
    return read_job(core, dataset).status == "succeeded"


def wrong_types(core: Core) -> list[str]:
    redis = core.queue.redis
    keys = ["rq:workers", "rq:queues"]
    for kind in KINDS:
        keys += [
            f"rq:queue:{kind}",
            f"rq:queue:{kind}:intermediate",
            f"rq:workers:{kind}",
            f"rq:clean_registries:{kind}",
        ]
        keys += [
            f"rq:{registry}:{kind}" for registry in ("wip", "finished", "failed", "deferred", "scheduled", "canceled")
        ]
    redis.delete(*keys)
    for number, key in enumerate(keys):
        if number % 2 and "clean" not in key:
            redis.set(key, "not what you think")
        else:
            redis.hset(key, "a", "b")
    return keys


def test_keys_of_the_wrong_type_are_put_right(core: Core) -> None:
    keys = wrong_types(core)
    job = add_job(core, "ingest")
    with pytest.raises(Exception, match="WRONGTYPE"):
        core.queue.waiting("ingest")
    assert set(core.queue.mend()) == set(keys)
    assert core.queue.mend() == []
    assert reconciler.requeue_forgotten(core) == 1
    assert core.queue.waiting("ingest") == {job}


def test_workers_go_on_after_keys_of_the_wrong_type(core: Core, spawn: Spawn) -> None:
    before = spawn("shared.jobs.worker", "ingest")
    first = new_dataset(core)
    wait_for(lambda: done(core, first), 60)
    wrong_types(core)
    spawn("shared.jobs.reconciler")
    second = new_dataset(core)
    wait_for(lambda: done(core, second), 60)
    assert before.poll() is None, "the same process"
    assert types_of(core, second)[-1] == "job.succeeded"


def test_garbage_on_a_list_does_not_stop_the_reconciler(core: Core) -> None:
    redis = core.queue.redis
    job = add_job(core, "ingest")
    redis.flushall()
    for garbage in (b"\xff\xfe", b"", b"-", b"a" * 10**6, "\u202e".encode(), b"{}", b"../../etc"):
        redis.rpush("rq:queue:ingest", garbage)
    assert reconciler.requeue_forgotten(core) == 1
    assert job in core.queue.waiting("ingest")


def test_nobody_suspends_or_commands_workers(core: Core, spawn: Spawn) -> None:
    """RQ's own switches: a key that makes workers wait, and messages that stop one or kill what it does."""
    redis = core.queue.redis
    redis.set("rq:suspended", 1)
    process = spawn("shared.jobs.worker", "ingest")
    first = new_dataset(core)
    wait_for(lambda: done(core, first), 60)
    (name,) = [key.decode().rpartition(":")[2] for key in redis.smembers("rq:workers")]
    for command in ("shutdown", "kill-horse", "stop-job"):
        assert redis.publish(f"rq:pubsub:{name}", json.dumps({"command": command, "job_id": first})) == 0
    second = new_dataset(core)
    wait_for(lambda: done(core, second), 30)
    assert process.poll() is None


def test_a_payload_brings_neither_a_bomb_nor_a_time_limit_nor_dependents(core: Core, spawn: Spawn) -> None:
    redis = core.queue.redis
    queue = Queue("ingest", connection=redis, serializer=JSONSerializer)
    bomb = zlib.compress(bytes(400 * 2**20), 9)
    for name, fields in {
        "bomb": {"data": bomb, "meta": bomb, "result": bomb},
        "status": {"status": "no such status"},
        "dates": {"created_at": "yesterday", "enqueued_at": "\x00"},
        "numbers": {"result_ttl": "many", "retries_left": "1e9", "timeout": "soon"},
        "dependents": {"dependency_ids": "not json", "retry_intervals": "["},
    }.items():
        queue.enqueue("os.getpid", job_id=f"forged-{name}")
        redis.hset(f"rq:job:forged-{name}", mapping=fields)
    redis.rpush("rq:queue:ingest", "nobody-knows-me", b"\xff\xfe")
    redis.set("rq:job:wrong-type", "text")
    redis.rpush("rq:queue:ingest", "wrong-type")
    redis.rpush("rq:queue:evil", "anything")
    redis.sadd("rq:queues", "rq:queue:evil")
    dataset = new_dataset(core)
    (wake_up,) = [id for id in redis.lrange("rq:queue:ingest", 0, -1) if id.startswith(dataset.encode())]
    redis.hset(b"rq:job:" + wake_up, mapping={"timeout": "0.001", "ttl": "1", "repeats_left": "1000"})
    process = spawn("shared.jobs.worker", "ingest")
    spawn("shared.jobs.reconciler")
    wait_for(lambda: done(core, dataset), 90)
    assert read_job(core, dataset).attempt == 1, "no time limit of the payload's ended the first attempt"
    peak = next(line for line in open(f"/proc/{process.pid}/status") if line.startswith("VmHWM"))  # noqa: SIM115
    assert int(peak.split()[1]) < 390 * 1024, "the bomb was not unpacked"
    assert redis.lrange("rq:queue:evil", 0, -1) == [b"anything"], "nobody works on a queue that is none of ours"


def test_a_job_on_another_kinds_list_is_not_done_there(core: Core, spawn: Spawn) -> None:
    dataset = new_dataset(core)
    core.queue.redis.flushall()
    core.queue.enqueue("caption", dataset)
    spawn("shared.jobs.worker", "caption", CAPTUNE_CAPTIONER_URL="http://127.0.0.1:1", CAPTUNE_SERVICE_TOKEN="t")
    wait_for(lambda: core.queue.depth("caption") == 0, 60)
    job = read_job(core, dataset)
    assert (job.status, job.attempt) == ("queued", 0)
