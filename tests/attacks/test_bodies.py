"""Bodies and addresses meant to exhaust, to confuse or to get past a check: floods of fields, of parts, of brackets.
Every answer is a 4xx in our own words. (Oversize with and without Content-Length, uploads without a key:
tests/integration/test_web.py; uploads cut off: tests/e2e/test_bad_input.py; slow ones: test_slow_clients.py.)"""

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from shared.core import Core
from shared.web.api import create_api
from shared.web.auth import Scope, create_key
from shared.web.body_limit import HELD_BODIES, STRANGERS_BYTES, WRITTEN_BYTES, BodyLimit
from tests.integration.conftest import ROUTERS
from tests.integration.factories import archive
from tests.integration.support import client

MIB = 2**20
CPU_SECONDS = 3.0
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def roomy(_core: Core) -> FastAPI:
    """With room for floods, as in production."""
    limits = {"max_json_bytes": 64 * MIB, "max_upload_bytes": 64 * MIB, "rate_limit": "off", "failed_auth_limit": "off"}
    return create_api(
        "Captune", Core(_core.settings.model_copy(update=limits), _core.db, _core.queue, _core.store), ROUTERS
    )


def with_key(app: FastAPI, core: Core, *scopes: Scope) -> TestClient:
    with core.transaction() as session:
        _, secret = create_key(session, owner="anna", name="test", scopes=scopes)
    return client(app, secret)


@pytest.fixture(scope="module")
def anna(roomy: FastAPI, _core: Core) -> TestClient:
    return with_key(roomy, _core, "read", "write")


@pytest.fixture(scope="module")
def admin(roomy: FastAPI, _core: Core) -> TestClient:
    return with_key(roomy, _core, "admin")


def refused(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400, 413, 415, 422)), answer.text[:300]
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 20_000, "an answer that echoes a flood is a flood"
    assert not any(word in answer.text for word in ("Traceback", 'File "', "site-packages", "RecursionError"))


# -- JSON --------------------------------------------------------------------------------------------------------------


def json_routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                yield method.upper(), path


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


FLOODS = {
    "100,000 brackets": nested(100_000),
    "100,000 brackets that never close": "[" * 100_000,
    "100,000 braces": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "brackets as deep as the reader goes": nested(900),
    "a field as deep as the reader goes": '{"dataset_id": "ds_x", "classifier_id": "x", "method": {"type": "flyp", '
    '"hyperparameters": {"epochs": %s}}, "name": %s, "metadata": %s}' % ((nested(900),) * 3),
    "400,000 empty lists": "[" + "[]," * 400_000 + "1]",
    "a hundred thousand keys": json.dumps({f"key{n}": n for n in range(100_000)}),
    "one key of 3 MB": json.dumps({"k" * 3_000_000: 1}),
    "a number of 100,000 digits": '{"limit": %s, "words": %s, "shots": %s}' % (("9" * 100_000,) * 3),
    "a number of 4,000 digits": '{"limit": %s, "words": %s, "shots": %s}' % (("9" * 4_000,) * 3),
    "numbers without end": '{"dataset_id": "ds_x", "temperature": NaN, "words": Infinity, "shots": -Infinity}',
    "a number past doubles": '{"dataset_id": "ds_x", "temperature": 1e999, "words": 1e999, "shots": -1e999}',
    "keys twice": '{"dataset_id": 1, "dataset_id": 2, "classifier_id": 1, "classifier_id": 2, "x": 1, "x": 2}',
    "half a surrogate": '{"dataset_id": "\\ud800", "classifier_id": "\\udfff", "name": "\\ud83d", "owner": "\\ud800"}',
    "NUL": '{"dataset_id": "\\u0000", "classifier_id": "\\u0000", "name": "\\u0000", "owner": "\\u0000"}',
    "no object": '"text"',
    "nothing": "",
    "null": "null",
    "JSON twice": "{}{}",
    "a prototype": '{"__proto__": {"admin": true}, "constructor": {"prototype": {"scopes": ["admin"]}}}',
}


@pytest.mark.parametrize("name", FLOODS)
def test_json_floods_on_every_route(roomy: FastAPI, admin: TestClient, name: str) -> None:
    routes = list(json_routes(roomy))
    assert len(routes) > 8
    if len(FLOODS[name]) > 500_000:  # the reading is the same for all of them
        routes = routes[:1]
    for method, path in routes:
        began = time.process_time()
        answer = admin.request(method, path.replace("{id}", "x"), content=FLOODS[name].encode(), headers=JSON)
        refused(answer, 400, 404, 409, 413, 422)
        assert time.process_time() - began < CPU_SECONDS, path


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        b"\xc0\xaf",
        gzip.compress(b"{}"),
        gzip.compress(bytes(20 * MIB)),
        b"\0" * 1000,
    ],
    ids=["UTF-16", "byte order mark", "overlong", "gzip", "gzip bomb", "NULs"],
)
def test_bodies_that_are_no_utf8_are_not_guessed_at(anna: TestClient, body: bytes) -> None:
    for encoding in (None, "gzip", "deflate", "br", "zstd"):
        headers = JSON | ({"Content-Encoding": encoding} if encoding else {})
        refused(anna.post("/v1/evaluations", content=body, headers=headers))


def test_a_body_of_another_type_is_not_read_as_json(anna: TestClient) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "application/xml",
        "a;" * 5000,
    ):
        refused(anna.post("/v1/evaluations", content=b'{"classifier_id": "x"}', headers={"Content-Type": kind}))


def test_what_is_written_by_hand_is_short(anna: TestClient) -> None:
    refused(anna.post("/v1/evaluations", content=b" " * (WRITTEN_BYTES + 1), headers=JSON), 413)
    body = b'{"classifier_id": "x"' + b" " * (WRITTEN_BYTES - 100) + b"}"
    refused(anna.post("/v1/evaluations", content=body, headers=JSON), 404)


def test_a_stranger_s_long_body_is_not_read(roomy: FastAPI) -> None:
    """JSON is parsed before a route checks its key, so anybody could make the server parse 64 MiB at a time."""
    for key in (None, "ck_wrong"):
        nobody = client(roomy, key)
        for path in ("/v1/evaluations", "/v1/caption_jobs", "/v1/classifiers/x/predict"):
            long = b"[" * (STRANGERS_BYTES + 1)
            refused(nobody.post(path, content=long, headers=JSON), 401)
            refused(nobody.post(path, content=iter([long]), headers=JSON), 401)  # no Content-Length
    refused(client(roomy, None).post("/v1/evaluations", content=b"{}", headers=JSON), 401, 422)


@pytest.mark.anyio
async def test_only_so_many_long_bodies_are_held_at_once() -> None:
    """Sixty-four MiB each: their number is bounded too."""

    async def reads_all(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    limited = BodyLimit(reads_all, json_bytes=1000, upload_bytes=1000)
    limited.held = HELD_BODIES * 1000 - 500
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 501, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/evaluations", "headers": []}
    await limited(scope, receive, send)
    assert sent[0]["status"] == 429
    assert limited.held == HELD_BODIES * 1000 - 500, "what a request held is given back"
    sent.clear()
    limited.held = 0
    await limited(scope, receive, send)
    assert (sent, limited.held) == ([], 0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# -- forms -------------------------------------------------------------------------------------------------------------

FORMS = ("/v1/datasets", "/v1/caption_jobs/import", "/v1/classifiers/import")
OPEN = b"--b\r\nContent-Disposition: form-data; name="
END = b"--b--\r\n"


def part(name: str, content: bytes = b"x", filename: str | None = None, more: bytes = b"") -> bytes:
    tail = "" if filename is None else f'; filename="{filename}"'
    return OPEN + f'"{name}"{tail}'.encode() + more + b"\r\n\r\n" + content + b"\r\n"


FORM_FLOODS: dict[str, tuple[bytes, str]] = {
    "100,000 fields": (part("name") * 100_000 + END, "b"),
    "100,000 files": (part("file", filename="a") * 100_000 + END, "b"),
    "two files": (part("file", filename="a") * 2 + END, "b"),
    "100,000 parts with nothing": (b"--b\r\n\r\n" * 100_000 + END, "b"),
    "a field of 10 MB": (part("name", b"x" * 10 * MIB) + END, "b"),
    "a header of 10 MB": (OPEN + b'"name"; x="' + b"y" * 10 * MIB + b'"\r\n\r\nx\r\n' + END, "b"),
    "100,000 headers": (part("name", more=b"\r\nX: y" * 100_000) + END, "b"),
    "a header that never ends": (b"--b\r\n" + b"X" * 10 * MIB, "b"),
    "no name": (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, "b"),
    "no disposition": (b"--b\r\nX: y\r\n\r\nx\r\n" + END, "b"),
    "no end": (part("name"), "b"),
    "another boundary": (part("name") + END, "c"),
    "a boundary of 10,000": (part("name") + END, "b" * 10_000),
    "an empty boundary": (part("name") + END, ""),
    "rubbish": (bytes(range(256)) * 1000, "b"),
    "nothing": (b"", "b"),
    "a form in a form": (
        part("file", part("name") + END, more=b"\r\nContent-Type: multipart/mixed; boundary=b") + END, "b",
    ),
    "base64 that nobody decodes": (part("name", b"eA==", more=b"\r\nContent-Transfer-Encoding: base64") + END, "b"),
}  # fmt: skip


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("name", FORM_FLOODS)
def test_form_floods(anna: TestClient, name: str, path: str) -> None:
    body, boundary = FORM_FLOODS[name]
    began = time.process_time()
    refused(anna.post(path, content=body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}))
    assert time.process_time() - began < CPU_SECONDS


def test_a_form_holds_one_file_and_the_few_words_that_go_with_it(anna: TestClient) -> None:
    """Starlette's own limits are a thousand of either."""
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    enough = part("name") + part("domain")
    for many in (part("extra") * 15, part("file", archive(), "x") * 2, part("domain", b"x" * 70_000)):
        refused(anna.post("/v1/datasets", content=enough + many + END, headers=headers), 400)


def test_a_form_without_a_boundary_or_of_another_kind(anna: TestClient) -> None:
    for kind in (
        "multipart/form-data",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
        "application/json",
    ):
        for path in FORMS:
            refused(anna.post(path, content=part("name") + END, headers={"Content-Type": kind}))
    flood = b"a=1&" * 500_000
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(anna.post("/v1/datasets", content=flood, headers=headers))


@pytest.mark.parametrize(
    "charset", ["undefined", "zlib_codec", "punycode", "idna", "utf-7", "unicode_escape", "nothing", "mbcs"]
)
def test_a_form_in_a_character_set_of_the_caller_s_choice(anna: TestClient, charset: str) -> None:
    """Python has codecs that are no character sets, and some whose cost is not linear."""
    body = part("name", b"+2AA-\\ud800" + b"-a" * 30_000) + part("domain") + END
    headers = {"Content-Type": f"multipart/form-data; charset={charset}; boundary=b"}
    began = time.process_time()
    refused(anna.post("/v1/datasets", content=body, headers=headers))
    refused(anna.post("/v1/classifiers/x/predict", content=body, headers=headers), 404)
    assert time.process_time() - began < CPU_SECONDS


NAMES = [
    "../../etc/passwd",
    "/etc/cron.d/x",
    "C:\\x.zip",
    "a\\u0000b",
    "%00",
    "\u202egpj.zip",
    "x" * 5000,
    "",
    "<script>",
    "'; DROP TABLE",
    "$(id)",
    "CON",
]


@pytest.mark.parametrize("name", NAMES)
def test_file_names_of_uploads_are_not_used(anna: TestClient, roomy: FastAPI, name: str) -> None:
    """The blob is named after the job, and the data set as the form says."""
    data = archive()
    files = {"file": (name or "x", data)}
    answer = anna.post("/v1/datasets", data={"name": "pets", "domain": "pets"}, files=files)
    if answer.status_code == 202:
        body = answer.json()
        assert roomy.state.core.store.read_bytes(f"uploads/{body['id']}") == data
        assert (body["name"], name in str(body) and len(name) > 3) == ("pets", False)
    else:
        refused(answer)


def test_fields_that_come_twice_or_as_files(anna: TestClient) -> None:
    twice = part("name", b"a") + part("name", b"b") + part("domain") + part("file", archive(), "x") + END
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert anna.post("/v1/datasets", content=twice, headers=headers).status_code in (202, 422)
    refused(anna.post("/v1/datasets", content=part("name", b"a", "x") + part("domain") + END, headers=headers))
    text = part("name", b"a") + part("domain") + part("file", b"no file") + END
    refused(anna.post("/v1/datasets", content=text, headers=headers))


# -- addresses ---------------------------------------------------------------------------------------------------------

QUERIES = {
    "6,000 parameters": "&".join(["split=val"] * 6_000),
    "6,000 names": "&".join(f"p{n}=1" for n in range(6_000)),
    "60,000 characters": "after=" + "x" * 60_000,
    "5,000 digits": "limit=" + "9" * 5_000,
    "NaN": "limit=nan",
    "exponent": "limit=1e3",
    "other digits": "limit=\uff11\uff10",
    "empty": "limit=",
    "NUL": "after=%00",
    "overlong": "after=%c0%ae",
    "array": "limit[]=1&limit[0]=2",
}


@pytest.mark.parametrize("name", QUERIES)
def test_query_floods(anna: TestClient, name: str) -> None:
    for path in ("/v1/datasets", "/v1/leaderboard", "/v1/datasets/ds_x/images"):
        began = time.process_time()
        answer = anna.get(f"{path}?{QUERIES[name]}")
        assert answer.status_code == 200 or answer.status_code in (400, 404, 422), answer.text[:300]
        assert time.process_time() - began < CPU_SECONDS


def test_long_and_odd_paths(anna: TestClient) -> None:
    for path in (
        "/v1/" + "a/" * 10_000,
        "/v1/datasets/" + "x" * 5_000,
        "/v1/datasets/..%2f..%2fetc%2fpasswd",
        "/v1/datasets/%2e%2e/%2e%2e/keys",
        "/v1//datasets",
        "/v1/datasets/%00",
        "/V1/DATASETS",
        "/v1/datasets/\u202e",
    ):
        answer = anna.get(path)
        refused(answer, 404, 422)
