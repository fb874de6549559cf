"""One request's ids through API, queue and worker; what Prometheus sees; what an OpenTelemetry collector gets."""

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from subprocess import Popen
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import REGISTRY

from shared.core import Core
from shared.jobs import ledger
from shared.jobs.reconciler import recover_lapsed, requeue_forgotten
from shared.jobs.worker import Runner
from tests.integration.factories import LONG_AGO, add_job, archive, change_job, events_of, read_job
from tests.integration.support import Api, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"X-Request-Id": "my-upload.1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
OPEN = {"data": {"name": "pets", "domain": "pets"}, "files": {"file": ("pets.zip", archive())}}


class Collector:
    """An OTLP/HTTP collector: whatever spans it is sent, as (service, name, trace id, parent's id, own id)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, str, str]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in sent.resource_spans:
                    service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                    for s in (span for scope in resource.scope_spans for span in scope.spans):
                        ids = (s.trace_id.hex(), s.parent_span_id.hex(), s.span_id.hex())
                        spans.append((service, s.name, *ids))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return None

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_request_is_found_again_in_the_worker(
    core: Core,
    client_for: Callable[..., httpx.Client],
    spawn: Callable[..., Popen[bytes]],
    collector: Collector,
    capfd: pytest.CaptureFixture[str],
) -> None:
    port, metrics_port = free_port(), free_port()
    setting = {"CAPTUNE_OTLP_ENDPOINT": collector.url, "CAPTUNE_METRICS_PORT": str(metrics_port)}
    app = ("services.captioner.app:create_app", "--port", str(port))
    api = spawn("shared.web.serve", *app, CAPTUNE_SERVICE_TOKEN="", **setting)
    worker = spawn("shared.jobs.worker", "ingest", **setting)
    key = client_for("anna", "write").headers["Authorization"]
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(url))
    answer = httpx.post(f"{url}/v1/datasets", headers={**HEADERS, "Authorization": key}, **OPEN)
    assert answer.headers["X-Request-Id"] == "my-upload.1"
    id = answer.json()["id"]
    wait_for(lambda: read_job(core, id).status == "succeeded")
    metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
    assert 'captune_job_attempts_total{kind="ingest"} 1.0' in metrics
    assert 'captune_job_attempt_seconds_count{kind="ingest",outcome="succeeded"} 1.0' in metrics
    for process in (api, worker):
        process.send_signal(signal.SIGTERM)
        process.wait(30)

    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    told = [line for line in lines if line.get("job_id") == id]
    assert [line["message"] for line in told] == ["job claimed", "job left"]
    for line in told:
        ids = (line["kind"], line["attempt"], line["request_id"], line["trace_id"])
        assert ids == ("ingest", 1, "my-upload.1", TRACE)
    (line,) = [line for line in lines if line["message"] == "request" and line["path"] == "/v1/datasets"]
    assert (line["request_id"], line["status"]) == ("my-upload.1", 202)

    spans = {name: span for span in collector.spans if (name := span[1]) in ("POST /v1/datasets", "ingest")}
    request, job = spans["POST /v1/datasets"], spans["ingest"]
    assert (request[0], *request[2:4]) == ("captune-captioner", TRACE, PARENT)
    assert (job[0], job[2]) == ("captune-worker-ingest", TRACE)
    assert events_of(core, id)[0].data == {"request_id": "my-upload.1", "traceparent": f"00-{TRACE}-{job[3]}-01"}
    assert any(span[3] == job[4] and span[1].startswith("INSERT") for span in collector.spans), "its SQL hangs below it"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_callers_request_id_is_taken_only_where_it_is_plain(api: Api) -> None:
    for given in ("x" * 65, "a b", 'say("hi")', "ü"):
        answer = api.anna.get("/healthz", headers={"X-Request-Id": given.encode()})
        assert answer.headers["X-Request-Id"].startswith("req_")


def test_a_method_nobody_knows_makes_no_time_series(api: Api) -> None:
    api.anna.request("BREW", "/v1/datasets")
    text = api.anna.get("/metrics").text
    assert 'method="other"' in text
    assert "BREW" not in text


def test_the_ledger_is_measured(core: Core, api: Api) -> None:
    add_job(core, "evaluate", queued_at=datetime.now(UTC) - timedelta(seconds=3600))
    add_job(core, "evaluate")
    add_job(core, "evaluate", run_after=datetime.now(UTC) + timedelta(seconds=60))
    add_job(core, "fine_tune", status="running", lease_until=datetime.now(UTC) + timedelta(seconds=60))
    add_job(core, "fine_tune", status="succeeded")
    api.anna.get("/metrics")
    assert sample("captune_jobs", kind="evaluate", status="queued") == 3
    assert sample("captune_jobs", kind="fine_tune", status="running") == 1
    assert sample("captune_jobs", kind="fine_tune", status="queued") == 0
    assert 3600 <= sample("captune_queue_age_seconds", kind="evaluate") < 3700
    assert sample("captune_queue_age_seconds", kind="caption") == 0


def test_a_job_that_waits_for_its_next_try_has_not_waited_yet(core: Core, api: Api) -> None:
    later = datetime.now(UTC) + timedelta(seconds=60)
    add_job(core, "evaluate", queued_at=datetime.now(UTC) - timedelta(seconds=3600), run_after=later)
    api.anna.get("/metrics")
    assert sample("captune_queue_age_seconds", kind="evaluate") == 0


def test_lost_leases_and_what_the_reconciler_did_are_counted(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {
        "lost": sample("captune_job_leases_lost_total", kind="caption"),
        "lapsed": sample("captune_reconciler_actions_total", action="lapsed", kind="caption"),
        "enqueued": sample("captune_reconciler_actions_total", action="enqueued", kind="caption"),
    }
    id = add_job(core)

    def task(claim: Any) -> Any:  # another attempt takes the job over while this one works
        change_job(core, id, lease_until=LONG_AGO)
        assert recover_lapsed(core) == 1
        core.queue.redis.flushall()
        change_job(core, id, queued_at=LONG_AGO)
        assert requeue_forgotten(core) == 1
        with core.transaction() as session:
            assert ledger.claim(session, id, "caption", "another", 30.0) is not None
        return lambda _: {}

    monkeypatch.setattr("shared.jobs.worker.load_task", lambda _: task)
    Runner(core, "caption", "test").run(id)
    assert read_job(core, id).worker == "another"
    assert sample("captune_job_leases_lost_total", kind="caption") == before["lost"] + 1
    assert sample("captune_reconciler_actions_total", action="lapsed", kind="caption") == before["lapsed"] + 1
    assert sample("captune_reconciler_actions_total", action="enqueued", kind="caption") == before["enqueued"] + 1
