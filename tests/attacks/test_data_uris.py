"""Pictures in chat requests: only data URIs, never fetched from anywhere, and with the same limits as uploads. And
pictures sent for a prediction."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from services.captioner.serving.chat_request import to_caption_requests
from services.captioner.serving.openai_schema import ChatRequest
from services.captioner.settings import CaptionerSettings
from shared.errors import CaptuneError
from tests.attacks.test_pictures import DEAR, JPEG, OTHERS, PNG, chunk, in_png
from tests.unit.captioner.serving.test_chat import app, chat, engine, send

__all__ = ["app", "chat", "engine", "send"]
Chat = Callable[..., httpx.Response]


class Hits:
    """A server inside; whoever asks it for anything is counted."""

    def __init__(self) -> None:
        hits = self.paths = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hits.append(self.path)
                self.send_response(302)
                self.send_header("Location", "/again")
                self.end_headers()

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port


@pytest.fixture(scope="module")
def inside() -> Iterator[Hits]:
    hits = Hits()
    threading.Thread(target=hits.server.serve_forever, args=(0.05,), daemon=True).start()
    yield hits
    hits.server.shutdown()
    hits.server.server_close()


def part(url: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "Describe."}, {"type": "image_url", "image_url": {"url": url}}]


def refused(answer: httpx.Response, *codes: str) -> None:
    assert answer.status_code in (400, 413), answer.text[:300]
    error = answer.json()["error"]
    assert error["code"] in codes, error
    assert len(answer.content) < 5_000
    assert "Traceback" not in answer.text


URLS = [
    "http://127.0.0.1:{port}/a",
    "HTTP://127.0.0.1:{port}/a",
    "https://127.0.0.1:{port}/a",
    "//127.0.0.1:{port}/a",
    "http://localhost:{port}/a",
    "http://[::1]:{port}/a",
    "http://[::ffff:127.0.0.1]:{port}/a",
    "http://2130706433:{port}/a",
    "http://0x7f000001:{port}/a",
    "http://0177.0.0.1:{port}/a",
    "http://127.1:{port}/a",
    "http://0:{port}/a",
    "http://\uff11\uff12\uff17.0.0.1:{port}/a",
    "http://127.0.0.1.nip.io:{port}/a",
    "http://user:pw@127.0.0.1:{port}/a",
    "http://data:{port}/a",
    " http://127.0.0.1:{port}/a",
    "\thttp://127.0.0.1:{port}/a",
    "h\nttp://127.0.0.1:{port}/a",
    "http://169.254.169.254/latest/meta-data/",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "/etc/passwd",
    "ftp://127.0.0.1:{port}/a",
    "gopher://127.0.0.1:{port}/_FLUSHALL",
    "dict://127.0.0.1:{port}/x",
    "redis://127.0.0.1:{port}",
    "jar:http://127.0.0.1:{port}!/a",
    "s3://bucket/key",
    "blob:http://127.0.0.1:{port}/a",
    "javascript:alert(1)",
    "data",
    "",
    "{port}",
    "datas:image/png;base64,AAAA",
]


@pytest.mark.parametrize("url", URLS)
def test_no_address_is_fetched(chat: Chat, inside: Hits, url: str) -> None:
    refused(chat(part(url.format(port=inside.port))), "remote_image_url", "invalid_data_uri")
    assert inside.paths == []


def test_the_server_inside_counts() -> None:
    """What the test above relies on."""
    hits = Hits()
    threading.Thread(target=hits.server.serve_forever, args=(0.05,), daemon=True).start()
    httpx.get(f"http://127.0.0.1:{hits.port}/a")
    assert hits.paths == ["/a"]
    hits.server.shutdown()
    hits.server.server_close()


GOOD = base64.b64encode(PNG).decode()
URIS = {
    "no comma": "data:image/png;base64",
    "no base64": "data:image/png,abc",
    "percent signs": "data:image/png,%89PNG",
    "empty": "data:image/png;base64,",
    "bad padding": "data:image/png;base64,AAA",
    "no base64 inside": "data:image/png;base64," + "!" * 40,
    "an address behind": "data:image/png;base64,http://127.0.0.1/",
    "white space inside": "data:image/png;base64," + GOOD[:8] + "\n" + GOOD[8:],
    "text": "data:text/plain;base64," + base64.b64encode(b"hello").decode(),
    "NUL": "data:image/png;base64,\0",
    "letters of other scripts": "data:image/png;base64,\u0410\u0410\u0410\u0410",
    "twice": "data:image/png;base64,data:image/png;base64," + GOOD,
}


@pytest.mark.parametrize("uri", URIS.values(), ids=URIS)
def test_data_uris_that_hold_no_picture(chat: Chat, uri: str) -> None:
    refused(chat(part(uri)), "invalid_data_uri", "empty_file", "unsupported_format", "unreadable_image")


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_whatever_the_uri_says_they_are(chat: Chat, name: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(OTHERS[name]).decode()
    refused(chat(part(uri)), "unsupported_format")


@pytest.mark.parametrize("name", [name for name in DEAR if "megapixels" not in name])
def test_what_is_dear_to_read_is_refused_here_as_well(name: str) -> None:
    settings = CaptionerSettings()
    uri = "data:image/png;base64," + base64.b64encode(DEAR[name]()).decode()
    body = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": part(uri)}]})
    with pytest.raises(CaptuneError) as caught:
        to_caption_requests(body, settings, 10**6)
    assert caught.value.code in {"unreadable_image", "unsupported_format"}
    assert caught.value.param == "messages.0.content.1.image_url.url"


def test_pictures_and_texts_beyond_the_limits(chat: Chat) -> None:
    many = [*part(f"data:image/png;base64,{GOOD}"), *part(f"data:image/png;base64,{GOOD}")] * 50
    refused(chat(many), "too_many_images")
    large = base64.b64encode(in_png(chunk(b"prVt", bytes(30_000)))).decode()
    refused(chat(part(f"data:image/png;base64,{large}")), "image_too_large")
    assert chat(part(f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}")).status_code == 200


JSON_FLOODS = {
    "brackets": '{"model": "describe", "messages": ' + "[" * 100_000,
    "closed brackets": '{"model": "describe", "messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "as deep as the reader goes": '{"model": "describe", "messages": ' + "[" * 900 + "]" * 900 + "}",
    "100,000 messages": '{"model": "describe", "messages": [' + '{"role": "tool", "content": 1},' * 100_000 + "1]}",
    "100,000 unknown names": json.dumps({f"k{n}": n for n in range(100_000)}),
    "one long name": json.dumps({"k" * 3_000_000: 1}),
    "one long model": json.dumps({"model": "m" * 3_000_000, "messages": [{"role": "user", "content": "x"}]}),
    "many digits": '{"model": "describe", "seed": %s}' % ("9" * 5000),
    "NaN": '{"model": "describe", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
}


@pytest.mark.parametrize("name", JSON_FLOODS)
def test_json_floods(send: Chat, name: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = send("POST", "/v1/chat/completions", content=JSON_FLOODS[name].encode(), headers=headers)
    assert answer.status_code in (400, 404, 413), answer.text[:300]
    assert set(answer.json()) == {"error"}
    assert len(answer.content) < 20_000
