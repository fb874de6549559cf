"""The OpenAI-shaped routes against a real batcher and a real (tiny) engine, without a socket."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from services.captioner.engines.base import CaptionRequest, Engine, Generation
from services.captioner.serving.batcher import Batcher
from services.captioner.serving.chat import router
from services.captioner.settings import CaptionerSettings, EngineSpec
from shared.web.auth import Principal, authenticate


class Describe(Engine):
    """Tells back what it was given."""

    precision = "fp32"
    warms_up = False

    def __init__(self) -> None:
        super().__init__(EngineSpec(max_batch=4, max_pixels=4096), "describe")
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[CaptionRequest] = []
        self.broken_seed: int | None = None

    def load(self) -> None:
        self.revision = "describe-1"

    def prepare(self, request: CaptionRequest) -> CaptionRequest:
        return request

    def generate(self, prepared: Sequence[CaptionRequest]) -> list[CaptionRequest]:
        self.requests += prepared
        self.gate.wait()
        if self.broken_seed is not None and self.broken_seed in [request.seed for request in prepared]:
            raise RuntimeError(f"no seed {self.broken_seed}")
        return list(prepared)

    def finish(self, raw: CaptionRequest) -> Generation:
        sizes = " ".join(f"{image.mode}{image.width}x{image.height}" for image in raw.images)
        return Generation(f"{raw.prompt}|{sizes}", "length", 7, 3, image_tokens=4)


@pytest.fixture
def engine() -> Describe:
    return Describe()


@pytest.fixture
def app(engine: Describe) -> Iterator[FastAPI]:
    app = FastAPI()
    app.include_router(router)
    batcher = Batcher(engine, max_wait_ms=0)
    app.state.batchers = {"describe": batcher}
    app.state.captioner_settings = CaptionerSettings(max_image_bytes=20_000, max_image_pixels=250_000, max_images=2)
    app.dependency_overrides[authenticate] = lambda: Principal("me", frozenset({"write"}))
    batcher.start()
    while not batcher.ready:
        time.sleep(0.001)
    yield app
    engine.gate.set()
    batcher.stop()


@pytest.fixture
def send(app: FastAPI) -> Callable[..., httpx.Response]:
    def call(method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://captioner") as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    return call


@pytest.fixture
def chat(send: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    def call(content: Any = "Describe.", **fields: Any) -> httpx.Response:
        body = {"model": "describe", "messages": [{"role": "user", "content": content}], **fields}
        return send("POST", "/v1/chat/completions", json=body)

    return call


def data_uri(width: int = 32, height: int = 16, mode: str = "RGB", kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_answer_has_openai_shape(chat: Callable[..., httpx.Response]) -> None:
    response = chat([image_part(data_uri()), {"type": "text", "text": "What is it?"}])
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert abs(body["created"] - time.time()) < 60
    assert (body["object"], body["model"], body["system_fingerprint"]) == ("chat.completion", "describe", "describe-1")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "What is it?|RGB32x16", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"image_tokens": 4}}


def test_every_setting_of_the_request_reaches_the_engine(chat: Callable[..., httpx.Response], engine: Describe) -> None:
    fields = {"max_completion_tokens": 9, "temperature": 1.5, "seed": -4, "metadata": {"class_name": "pug"}}
    chat("hi", **fields, n=1, stream=False, stop=["\n", "."])
    (got,) = engine.requests
    assert got.stop == ("\n", ".")
    assert got.on_text is None  # nobody listens
    assert (got.prompt, got.max_tokens, got.temperature, got.seed) == ("hi", 9, 1.5, -4)
    assert got.metadata == {"class_name": "pug"}


def test_samples_differ_in_their_seeds_and_the_prompt_is_counted_once(
    chat: Callable[..., httpx.Response], engine: Describe
) -> None:
    body = chat("hi", n=3, seed=2**63 - 2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(request.seed or 0 for request in engine.requests) == [-(2**63), 2**63 - 2, 2**63 - 1]
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    assert body["usage"] == {**usage, "prompt_tokens_details": {"image_tokens": 4}}
    engine.requests.clear()
    chat("hi", n=2)
    assert [request.seed for request in engine.requests] == [None, None]


def test_one_sample_that_fails_fails_the_request(chat: Callable[..., httpx.Response], engine: Describe) -> None:
    engine.broken_seed = 12
    response = chat("hi", n=3, seed=11)
    assert response.status_code == 500
    assert "no seed 12" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [("y", "he", "stop"), (["?", "you", "the"], "hey ", "stop"), ("not there", "hey there, you|", "length")],
)
def test_the_text_ends_before_the_first_stop_also_where_the_engine_ignores_it(
    chat: Callable[..., httpx.Response], stop: str | list[str], text: str, reason: str
) -> None:
    (choice,) = chat("hey there, you", stop=stop).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_a_stream_has_openai_shape(chat: Callable[..., httpx.Response]) -> None:
    response = chat("hi", stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    common = {"object": "chat.completion.chunk", "model": "describe", "system_fingerprint": "describe-1"}
    assert all(common.items() <= chunk.items() for chunk in chunks)
    plain = {"index": 0, "finish_reason": None, "logprobs": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [{**plain, "delta": {"role": "assistant", "content": ""}}],
        [{**plain, "delta": {"content": "hi|"}}],
        [{**plain, "delta": {}, "finish_reason": "length"}],
        [],
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    usages = [None, None, None, {**usage, "prompt_tokens_details": {"image_tokens": 4}}]
    assert [chunk["usage"] for chunk in chunks] == usages
    assert '"usage"' not in chat("hi", stream=True).text


def test_system_text_and_several_parts_form_one_prompt(send: Callable[..., httpx.Response], engine: Describe) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "First."},
                image_part(data_uri(kind="JPEG")),
                image_part(data_uri(8, 8, "L")),
                {"type": "text", "text": "Second."},
            ],
        },
    ]
    response = send("POST", "/v1/chat/completions", json={"model": "describe", "messages": messages})
    assert response.status_code == 200, response.text
    (got,) = engine.requests
    assert got.prompt == "Be brief.\nFirst.\nSecond."
    assert [(image.mode, image.size) for image in got.images] == [("RGB", (32, 16)), ("RGB", (8, 8))]


def test_pictures_are_scaled_to_the_engine_before_they_wait(
    chat: Callable[..., httpx.Response], engine: Describe
) -> None:
    chat([image_part(data_uri(400, 100)), {"type": "text", "text": "x"}])
    (picture,) = engine.requests[0].images
    assert picture.width * picture.height <= 4096
    assert picture.width / picture.height == pytest.approx(4, rel=0.05)


PNG = data_uri()
BAD_CONTENT = [
    ([image_part("https://example.org/cat.png")], "remote_image_url", 400),
    ([image_part("http://169.254.169.254/latest")], "remote_image_url", 400),
    ([image_part("file:///etc/passwd")], "remote_image_url", 400),
    ([image_part("data:image/png,abc")], "invalid_data_uri", 400),
    ([image_part("data:image/png;base64,@@@@")], "invalid_data_uri", 400),
    ([image_part("data:image/png;base64,")], "empty_file", 400),
    ([image_part(PNG[:-40])], "truncated_image", 400),
    ([image_part("data:image/png;base64,aGVsbG8gd29ybGQ=")], "unsupported_format", 400),
    ([image_part(data_uri(600, 500))], "image_too_large", 400),
    ([image_part("data:image/png;base64," + "A" * 40_000)], "image_too_large", 413),
]


@pytest.mark.parametrize(("content", "code", "status"), BAD_CONTENT, ids=[code for _, code, _ in BAD_CONTENT])
def test_bad_pictures_are_refused_by_name_and_place(
    chat: Callable[..., httpx.Response], engine: Describe, content: list[Any], code: str, status: int
) -> None:
    response = chat([{"type": "text", "text": "x"}, *content])
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages.0.content.1.image_url.url"
    assert not engine.requests


BAD_FIELDS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"n": 17}, "invalid_value", "n"),
    ({"stop": [""]}, "invalid_value", "stop.0"),
    ({"stop": list("abcde")}, "invalid_value", "stop"),
    ({"stop": 5}, "invalid_value", "stop"),
    ({"stream_options": {"include_usage": True}}, "unsupported_value", "stream_options"),
    ({"stream": True, "stream_options": {"speed": 2}}, "unsupported_parameter", "stream_options.speed"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
    ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    ({"metadata": {"words": 20}}, "invalid_value", "metadata.words"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "unsupported_value", "messages.0.role"),
    ({"messages": [{"role": "user", "content": [image_part(PNG)]}]}, "empty_prompt", "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, *[image_part(PNG)] * 3]}]},
        "too_many_images",
        "messages",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "invalid_value",
        "messages.0.content.0.image_url.url",
    ),
]


@pytest.mark.parametrize(
    ("fields", "code", "param"), BAD_FIELDS, ids=[next(iter(f)) + "-" + c for f, c, _ in BAD_FIELDS]
)
def test_what_is_not_served_is_refused_clearly(
    chat: Callable[..., httpx.Response], fields: dict[str, Any], code: str, param: str | None
) -> None:
    response = chat(**fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
    assert len(error["message"]) > 15


def test_unknown_model_names_the_served_ones(chat: Callable[..., httpx.Response]) -> None:
    response = chat(model="gpt-9")
    assert response.status_code == 404
    assert "describe" in error_of(response)["message"]
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b'{"model": "describe", ', {"content-type": "application/json"}, 400, "invalid_json"),
        (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
    ],
)
def test_unreadable_bodies(
    send: Callable[..., httpx.Response], content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    response = send("POST", "/v1/chat/completions", content=content, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_full_queue_answers_429_with_retry_after(app: FastAPI, engine: Describe) -> None:
    small = Batcher(engine, queue_size=1, max_wait_ms=0)
    small.start()
    while not small.ready:
        time.sleep(0.001)
    app.state.batchers["describe"] = small
    engine.gate.clear()

    async def go() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://c") as client:
            body = {"model": "describe", "messages": [{"role": "user", "content": "x"}]}
            tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(8)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.1)
            engine.gate.set()
            return await asyncio.gather(*tasks)

    responses = asyncio.run(go())
    small.stop()
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert error_of(refused[0])["type"] == "rate_limit_error"
    assert int(refused[0].headers["Retry-After"]) >= 1
    assert any(response.status_code == 200 for response in responses)


def test_client_that_hangs_up_frees_its_place(app: FastAPI, engine: Describe) -> None:
    batcher: Batcher = app.state.batchers["describe"]
    engine.gate.clear()
    body = b'{"model": "describe", "messages": [{"role": "user", "content": "%s"}]}'
    sent: list[Any] = []

    async def call(prompt: bytes, hang_up: asyncio.Event) -> None:
        messages = [{"type": "http.request", "body": body % prompt, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"c")]
        scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        scope |= {"scheme": "http"}
        scope |= {"path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b""}
        await app({**scope, "headers": headers, "client": ("c", 1), "server": ("s", 80)}, receive, send)

    async def go() -> None:
        stay, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(call(b"stays", stay))
        while not engine.requests:
            await asyncio.sleep(0.002)
        second = asyncio.create_task(call(b"leaves", leave))
        while not batcher.waiting:
            await asyncio.sleep(0.002)
        leave.set()
        await asyncio.wait_for(second, 5)
        assert sent[0]["status"] == 499
        engine.gate.set()
        await asyncio.wait_for(first, 5)
        await batcher.submit(CaptionRequest((), "after"))

    asyncio.run(go())
    assert [request.prompt for request in engine.requests] == ["stays", "after"]


def test_model_list_tells_engine_revision_and_readiness(send: Callable[..., httpx.Response]) -> None:
    body = send("GET", "/v1/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("describe", "model", "captune")
    assert card["created"] > 1_500_000_000
    expected = {"engine": "attributes", "revision": "describe-1", "precision": "fp32", "ready": True, "error": None}
    assert card["captune"] == {**expected, "captions_per_second": None}  # it does not warm up
    assert send("GET", "/v1/models/describe").json() == card
    assert error_of(send("GET", "/v1/models/nope"))["code"] == "model_not_found"


def test_scopes_are_required(app: FastAPI, send: Callable[..., httpx.Response]) -> None:
    app.dependency_overrides[authenticate] = lambda: Principal("me", frozenset({"read"}))
    body = {"model": "describe", "messages": [{"role": "user", "content": "x"}]}
    refused = send("POST", "/v1/chat/completions", json=body)
    assert (refused.status_code, error_of(refused)["type"]) == (403, "permission_error")
    assert send("GET", "/v1/models").status_code == 200
    del app.dependency_overrides[authenticate]
    unknown = send("POST", "/v1/chat/completions", json=body)
    assert (unknown.status_code, error_of(unknown)["type"]) == (401, "authentication_error")
