"""SSRF: the server fetches nothing that a user names. A listener counts whoever comes; a list names every module that
can open a connection at all."""

import ast
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from services.captioner import app as captioner
from services.captioner.engines.openai_http import Wire
from services.captioner.settings import EngineSpec
from services.embedded.api import ROUTERS
from shared.core import Core
from shared.errors import CaptuneError
from shared.web.api import create_api
from shared.web.auth import create_key
from tests.attacks.belongings import belongings
from tests.integration.support import wait_for

ROOT = Path(__file__).resolve().parents[2]

# Every module that could open a connection, and to where. What is not here may not import any of LIBRARIES.
OUTBOUND = {
    "services/captioner/captioning/remote.py": "the captioner, at CAPTUNE_CAPTIONER_URL",
    "services/captioner/engines/hub.py": "the model hub, for the operator's engines",
    "services/captioner/engines/openai_http.py": "the model servers in CAPTUNE_ENGINES",
    "services/embedded/demo.py": "the stack it has started",
    "services/embedded/stack.py": "the stack it has started",
    "shared/clip/tokens.py": "the model hub, for a tokenizer of open_clip's own list",
    "shared/store/opening.py": "the store, at STORAGE_URL",
}
LIBRARIES = {
    *("httpx", "requests", "urllib3", "aiohttp", "urllib.request", "http.client", "ftplib", "smtplib", "xmlrpc"),
    *("huggingface_hub", "fsspec", "websockets", "paramiko"),
}
URLS = [
    "http://127.0.0.1:{port}/a.png",
    "http://localhost:{port}/a.png",
    "http://[::1]:{port}/a.png",
    "http://[::ffff:127.0.0.1]:{port}/a.png",
    "http://2130706433:{port}/a.png",
    "http://0x7f000001:{port}/a.png",
    "http://017700000001:{port}/a.png",
    "http://127.1:{port}/a.png",
    "http://0:{port}/a.png",
    "http://127.0.0.1.nip.io:{port}/a.png",  # a name that resolves to it: DNS rebinding
    "http://user:password@127.0.0.1:{port}/a.png",
    "HTTP://127.0.0.1:{port}/a.png",
    "//127.0.0.1:{port}/a.png",
    "ftp://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_",
    "http://169.254.169.254/latest/meta-data/",
    "file:///etc/passwd",
    "/etc/passwd",
    "data:text/html,<script src=http://127.0.0.1:{port}/></script>",
    "jar:http://127.0.0.1:{port}/a.zip!/a.png",
    " http://127.0.0.1:{port}/a.png",
    "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciLz4=",
]


class Visits:
    def __init__(self) -> None:
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.redirect_to: str | None = None


@contextmanager
def listener() -> Iterator[Visits]:
    visits = Visits()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.paths.append(self.path)
            visits.headers.append(dict(self.headers))
            self.send_response(200 if visits.redirect_to is None else 307)
            if visits.redirect_to is not None:
                self.send_header("Location", visits.redirect_to)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_HEAD = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    visits.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield visits
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


@pytest.fixture
def visits() -> Iterator[Visits]:
    with listener() as counted:
        yield counted


@pytest.fixture
def no_connection(monkeypatch: pytest.MonkeyPatch, core: Core) -> list[Any]:
    """Addresses that anything in this process tried to connect to, besides database and queue."""
    tried: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    ours = (core.settings.database_url.get_secret_value() + core.settings.redis_url.get_secret_value()).replace(
        "%2F", "/"
    )

    def watched(self: socket.socket, address: Any) -> None:
        if str(address[0] if isinstance(address, tuple) else address) not in ours:
            tried.append(address)
        connect(self, address)

    def watched_names(host: Any, *arguments: Any, **named: Any) -> Any:
        tried.append(host)
        return resolve(host, *arguments, **named)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(socket, "getaddrinfo", watched_names)
    return tried


@pytest.fixture
def whole(core: Core) -> Iterator[TestClient]:
    """The one-process application with its engine, and a key of anna's."""
    app = create_api("Captune", core, ROUTERS, [captioner.lifespan])
    with core.transaction() as session:
        _, key = create_key(session, owner="anna", name="test", scopes=("read", "write"))
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def test_an_image_url_is_not_fetched(whole: TestClient, visits: Visits, no_connection: list[Any]) -> None:
    for url in URLS:
        picture = {"type": "image_url", "image_url": {"url": url.format(port=visits.port)}}
        content = [picture, {"type": "text", "text": "What?"}]
        body = {"model": "attributes", "messages": [{"role": "user", "content": content}]}
        answer = whole.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, f"{url}: {answer.text}"
        assert answer.json()["error"]["param"] == "messages.0.content.0.image_url.url", url
    assert visits.paths == []
    assert no_connection == []


def test_no_other_field_is_fetched(whole: TestClient, core: Core, visits: Visits, no_connection: list[Any]) -> None:
    """URLs wherever a text may stand: names, models, files, metadata, made-up webhooks."""
    url = f"http://127.0.0.1:{visits.port}/a"
    mine = belongings(core)
    id = mine.dataset
    file = {"file": ("a.csv", f"file_name,caption\n{url},a cat\n".encode())}
    forms = [
        ("datasets", {"name": url, "domain": url, "url": url}, {"file": ("a.zip", url.encode())}),
        ("datasets", {"name": url, "domain": url, "file": url}, None),
        ("caption_jobs/import", {"dataset_id": id, "url": url}, {"file": (url, file["file"][1])}),
        ("caption_jobs/import", {"dataset_id": id, "clip_model": url}, file),
        ("classifiers/import", {"dataset_id": id, "file": url}, None),
    ]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("caption_jobs", {"dataset_id": id, "engine": url}),
        ("caption_jobs", {"dataset_id": id, "webhook": url, "callback_url": url}),
        ("fine_tuning/jobs", {"dataset_id": id, "model": url, "method": {"type": "zero_shot"}}),
        ("fine_tuning/jobs", {"dataset_id": id, "integrations": [{"url": url}]}),
        ("evaluations", {"dataset_id": id, "model": url}),
    ]
    tries = [whole.post(f"/v1/{path}", data=data, files=files) for path, data, files in forms]
    tries += [whole.post(f"/v1/{path}", json=body) for path, body in bodies]
    tries += [whole.get("/v1/datasets", headers={"Referer": url, "X-Forwarded-Host": f"127.0.0.1:{visits.port}"})]
    assert {answer.status_code for answer in tries} <= {200, 202, 404, 422}
    assert visits.paths == []
    assert no_connection == []


def test_a_base_url_comes_from_the_operator_alone() -> None:
    """No request body has a field for one."""
    document = json.loads((ROOT / "docs/openapi/captioner.json").read_text())
    fields = {name for schema in document["components"]["schemas"].values() for name in schema.get("properties", {})}
    assert fields & {"base_url", "base_urls", "webhook", "webhooks", "callback_url"} == set()
    assert {name for name in fields if "url" in name} == {"image_url", "url"}  # of chat completions; refused above


def test_a_model_servers_redirect_is_not_followed(visits: Visits) -> None:
    """It would carry pictures, and the key, to wherever the server says."""
    with listener() as elsewhere:
        visits.redirect_to = f"http://127.0.0.1:{elsewhere.port}/v1/chat/completions"
        url = f"http://127.0.0.1:{visits.port}/v1"
        spec = EngineSpec.model_validate({"type": "openai", "model": "m", "base_urls": [url], "api_key": "sk-secret"})
        answer = Wire(spec, "remote").send(url, "POST", "/chat/completions", time.monotonic() + 5, b"{}")
        assert getattr(answer, "status", None) == 307
        assert visits.headers[0]["Authorization"] == "Bearer sk-secret"
        assert elsewhere.paths == []


@pytest.mark.parametrize("url", ["http://user:pw@h/v1", "http://h/v1?x=1", "http://h/v1#f"])
def test_an_engines_url_carries_no_secret(url: str) -> None:
    with pytest.raises(CaptuneError):
        Wire(EngineSpec.model_validate({"type": "openai", "model": "m", "base_urls": [url]}), "remote")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def test_only_the_modules_named_here_can_open_a_connection() -> None:
    sources = [path for folder in ("services", "shared") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        if any(name == library or name.startswith(f"{library}.") for name in imported(path) for library in LIBRARIES)
    }
    assert found == OUTBOUND.keys()
