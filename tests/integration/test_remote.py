"""The caption worker's client against a real server that misbehaves: what is the request's fault, and what is not."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import func, select

from services.captioner import captioning
from services.captioner.remote import Captioner
from shared.core import Core
from shared.db.models import Caption
from shared.errors import InvalidInput, Unavailable
from shared.jobs import Cancelled
from shared.jobs.worker import Runner
from shared.schemas.captions import CaptionJobRequest
from tests.integration.factories import LONG_AGO, add_dataset, add_job, change_job, events_of, read_job

Answer = tuple[int, Any]
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that gives these answers in turn, the last one for ever. Returns its URL."""
    servers = []

    def start(*answers: Answer) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = left.pop(0) if len(left) > 1 else left[0]
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text: str, revision: str = "r1") -> Answer:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {"choices": [choice], "usage": usage, "system_fingerprint": revision}


def card(ready: bool) -> Answer:
    return 200, {
        "data": [{"id": "m", "captune": {"engine": "hf", "revision": "r1", "precision": "nf4", "ready": ready}}]
    }


def ask(url: str, patience: float = 1.5, check: Callable[[], None] = lambda: None) -> str:
    with Captioner(url, "token", check, patience) as remote:
        return remote.caption("m", "r1", b"image", "image/png", "describe").text


def refusal(status: int) -> Answer:
    return status, {"error": {"message": "the server's own words", "code": "why"}}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_final_and_keeps_the_servers_words(serve: Serve, status: int) -> None:
    with pytest.raises(InvalidInput, match="the server's own words") as error:
        ask(serve(refusal(status), completion("never reached")))
    assert error.value.code == "why"


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 502, 503])
def test_a_failure_of_the_server_is_not_an_images_refusal(serve: Serve, status: int) -> None:
    assert ask(serve(refusal(status), completion("a red bird"))) == "a red bird"
    with pytest.raises(Unavailable, match=f"answered {status}"):
        ask(serve(refusal(status)), patience=0.5)


def test_a_server_that_is_away_is_waited_for_within_patience() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        ask("http://127.0.0.1:9", patience=0.5)


def test_a_cancelled_job_does_not_wait(serve: Serve) -> None:
    def cancelled() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        ask(serve(refusal(503)), patience=60, check=cancelled)


def test_a_replaced_model_writes_no_caption_under_the_old_revision(serve: Serve) -> None:
    with pytest.raises(Unavailable, match="was replaced"):
        ask(serve(completion("a red bird", revision="r2")))


def test_text_that_a_database_cannot_hold_is_made_so(serve: Serve) -> None:
    assert ask(serve(completion("a\0b\ud800c"))) == "a\ufffdb\ufffdc"


def test_a_loading_model_is_waited_for_and_an_unknown_one_named(serve: Serve) -> None:
    with Captioner(serve(card(False), card(True)), "token", lambda: None) as remote:
        assert remote.model("m")["precision"] == "nf4"
        with pytest.raises(InvalidInput, match="it serves: m"):
            remote.model("other")


def test_attempts_that_write_no_caption_are_bounded(core: Core, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking over captions that an earlier attempt wrote is no progress: it must not wipe the failures."""
    ok, replaced = completion("a red bird"), completion("a red bird", revision="r2")
    url = serve(card(True), ok, ok, replaced, card(True), replaced)  # the third image never gets its caption
    monkeypatch.setenv("CAPTUNE_CAPTIONER_URL", url)
    monkeypatch.setenv("CAPTUNE_SERVICE_TOKEN", "token")
    monkeypatch.setattr(captioning, "CHUNK", 1)
    dataset_id = add_dataset(core, images=2)
    request = CaptionJobRequest(dataset_id=dataset_id, engine="m", characteristics=["visual"], domain="pets")
    job_id = add_job(core, "caption", request=request.model_dump(), dataset_id=dataset_id)
    for failures in (1, 2):
        Runner(core, "caption", "test").run(job_id)
        job = read_job(core, job_id)
        assert (job.status, job.failures) == ("queued", failures), events_of(core, job_id)[-1].message
        with core.transaction() as session:
            assert session.scalar(select(func.count()).select_from(Caption)) == 2
        change_job(core, job_id, run_after=LONG_AGO)
