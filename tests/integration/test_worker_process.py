"""`python -m shared.jobs.worker` as it is deployed, against a queue that somebody else can write to."""

import json
import pickle
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from subprocess import Popen

import pytest
from rq import Callback, Queue
from rq.serializers import JSONSerializer
from rq.webhook import Webhook

from shared.core import Core
from shared.db.models import Dataset
from shared.ids import new_id
from shared.jobs import ledger
from tests.integration.conftest import ROOT
from tests.integration.factories import archive, read_job, types_of
from tests.integration.support import wait_for


class Listener(BaseHTTPRequestHandler):
    calls: list[str] = []

    def do_POST(self) -> None:
        self.calls.append(self.path)
        self.send_response(200)
        self.end_headers()

    do_GET = do_POST


@pytest.fixture
def listener() -> Iterator[str]:
    Listener.calls.clear()
    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.path),)


def new_dataset(core: Core) -> str:
    """What `POST /v1/datasets` leaves behind."""
    id = new_id("ds")
    core.store.put_bytes(f"uploads/{id}", archive())
    fields = {"name": "pets", "domain": "pets", "archive_sha256": "0", "archive_bytes": 1, "split_seed": 0}
    with core.transaction() as session:
        ledger.create(session, id=id, kind="ingest", owner="anna", request={}, dataset_id=id)
        row = Dataset(id=id, owner="anna", archive_key=f"uploads/{id}", val_fraction=0.1, test_fraction=0.2, **fields)
        session.add(row)
    return id


def test_a_forged_payload_runs_nothing_and_the_worker_lives(
    core: Core, spawn: Callable[..., Popen[bytes]], tmp_path: Path, listener: str
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nmarks = Path({str(marks)!r})\n(marks / 'imported').touch()\n"
        "def touch(*arguments, **named):\n    (marks / 'called').touch()\n"
    )
    redis = core.queue.redis
    queue = Queue("ingest", connection=redis, serializer=JSONSerializer)
    queue.enqueue("os.mkdir", str(marks / "made by a function"), job_id="forged-function")
    queue.enqueue("evil.touch", job_id="forged-import")
    queue.enqueue(
        "shared.jobs.worker.run",
        "ds_nothing",
        job_id="forged-callbacks",
        on_success=Callback("evil.touch"),
        on_failure=Callback("evil.touch"),
        on_stopped=Callback("evil.touch"),
        webhooks=[Webhook(listener, status) for status in ("finished", "failed")],
    )
    for name, payload in {
        "pickle": pickle.dumps(Trap(marks / "made by a pickle")),
        "packed-pickle": zlib.compress(pickle.dumps(Trap(marks / "made by a packed pickle"))),
        "garbage": b"\x00\xff not even compressed",
        "json": zlib.compress(json.dumps({"not": "a call"}).encode()),
    }.items():
        queue.enqueue("os.getpid", job_id=f"forged-{name}", webhooks=[Webhook(listener, "failed")])
        redis.hset(f"rq:job:forged-{name}", "data", payload)
    dataset_id = new_dataset(core)  # behind the forged ones on the list

    process = spawn("shared.jobs.worker", "ingest", PYTHONPATH=f"{tmp_path}:{ROOT}")
    wait_for(lambda: read_job(core, dataset_id).status == "succeeded", 60)

    assert process.poll() is None
    assert redis.llen("rq:queue:ingest") == 0
    assert [path.name for path in marks.iterdir()] == []
    assert Listener.calls == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_the_worker_goes_on_after_redis_lost_its_memory(core: Core, spawn: Callable[..., Popen[bytes]]) -> None:
    spawn("shared.jobs.worker", "ingest")
    first = new_dataset(core)
    wait_for(lambda: read_job(core, first).status == "succeeded", 60)
    core.queue.redis.flushall()
    spawn("shared.jobs.reconciler")
    second = new_dataset(core)
    core.queue.redis.flushall()
    wait_for(lambda: read_job(core, second).status == "succeeded", 60)
    assert types_of(core, second)[-1] == "job.succeeded"
