"""OpenAI's own client against our routes, over a real socket: what it sends is taken, what we answer it understands."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from openai.types.chat import ChatCompletion
from PIL import Image

from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest, Engine, Generation
from services.captioner.serving.batcher import Batcher
from services.captioner.serving.chat import router
from services.captioner.settings import CaptionerSettings, EngineSpec
from shared.web.auth import Principal, authenticate
from tests import tiny_mllm
from tests.unit.captioner.serving.echo import wait_for


class Talker(Engine):
    """Says its prompt word by word, one per opening of the gate; some words make it misbehave."""

    warms_up = False

    def __init__(self) -> None:
        super().__init__(EngineSpec(max_batch=1), "talker")
        self.gate = threading.Semaphore(0)
        self.prompts: list[str] = []

    def load(self) -> None:
        self.revision = "talker-1"

    def prepare(self, request: CaptionRequest) -> CaptionRequest:
        return request

    def generate(self, prepared: Sequence[CaptionRequest]) -> list[str]:
        (request,) = prepared
        self.prompts.append(request.prompt)
        spoken = []
        for word in request.prompt.split():
            self.gate.acquire()
            if word == "throw":
                raise RuntimeError("device error")
            if word == "die":
                raise SystemExit("thread killed")
            if word == "vanish":
                return []
            if word == "hang":
                time.sleep(1.0)
            spoken.append(word + " ")
            if request.on_text:
                request.on_text(spoken[-1])
        return ["".join(spoken) + "(end)"]

    def finish(self, raw: str) -> Generation:
        return Generation(raw, "stop", prompt_tokens=10, completion_tokens=4, image_tokens=6)


@pytest.fixture(scope="module")
def talker() -> Talker:
    return Talker()


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, talker: Talker) -> Iterator[FastAPI]:
    checkpoint = tiny_mllm.build(tmp_path_factory.mktemp("models") / "tiny")
    spec = EngineSpec(type="hf", model=str(checkpoint), device="cpu", precision="fp32")
    batchers = {
        "attributes": Batcher(build("attributes", EngineSpec())),
        "tiny": Batcher(build("tiny", spec, [checkpoint.parent])),
        "talker": Batcher(talker, queue_size=1, max_wait_ms=0),
    }
    app = FastAPI()
    app.include_router(router)
    app.state.batchers = batchers
    app.state.captioner_settings = CaptionerSettings()
    app.dependency_overrides[authenticate] = lambda: Principal("me", frozenset({"write"}))
    for batcher in batchers.values():
        batcher.start()
    deadline = time.monotonic() + 60
    while not all(batcher.ready for batcher in batchers.values()):
        assert time.monotonic() < deadline, {name: batcher.error for name, batcher in batchers.items()}
        time.sleep(0.05)
    yield app
    talker.gate.release(1000)
    for batcher in batchers.values():
        batcher.stop()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[OpenAI]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="ck_any", max_retries=0, timeout=30) as made:
        yield made
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def quiet(app: FastAPI, talker: Talker) -> Iterator[Batcher]:
    """The talker's batcher, with nothing left over from another test."""
    batcher: Batcher = app.state.batchers["talker"]
    while talker.gate.acquire(blocking=False):
        pass
    talker.prompts.clear()
    yield batcher
    talker.gate.release(50)
    wait_for(lambda: batcher.waiting == 0 and not batcher._pipeline._in_flight)


def picture(colour: str, size: tuple[int, int] = (64, 48)) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def ask(client: OpenAI, model: str, *parts: dict[str, Any], text: str = "Describe it.", **fields: Any) -> Any:
    content = [*parts, {"type": "text", "text": text}]
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **fields)


def test_models_are_listed_and_had_one_by_one(client: OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"attributes", "tiny", "talker"}
    assert client.models.retrieve("tiny") == cards["tiny"]
    served = cards["attributes"].model_dump()["captune"]
    assert served["ready"] is True
    assert served["captions_per_second"] > 0  # measured at warm-up
    with pytest.raises(openai.NotFoundError, match="Choose one of: attributes, talker, tiny"):
        client.models.retrieve("gpt-9")


def test_text_and_a_picture_make_a_caption(client: OpenAI) -> None:
    answer: ChatCompletion = ask(client, "attributes", picture("red"), metadata={"class_name": "fire truck"})
    assert "fire truck" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_two_pictures_are_read_and_counted(client: OpenAI) -> None:
    def tokens(*parts: dict[str, Any]) -> int:
        usage = ask(client, "tiny", *parts, max_tokens=4).usage
        assert usage.prompt_tokens_details.image_tokens is not None  # the client knows the field
        return int(usage.prompt_tokens)

    none, one, two = tokens(), tokens(picture("red")), tokens(picture("red"), picture("blue"))
    assert none < one < two
    assert two - one == one - none


def test_samples_and_seeds(client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5}

    def texts(**more: Any) -> list[str]:
        answer = ask(client, "tiny", picture("red"), **fields, **more)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    both = texts(n=2, seed=7)
    assert both == texts(n=2, seed=7)
    assert both[0] != both[1]
    assert both == [*texts(seed=7), *texts(seed=8)]
    usage = ask(client, "tiny", picture("red"), **fields, n=2, seed=7).usage
    single = ask(client, "tiny", picture("red"), **fields, seed=7).usage
    assert usage.prompt_tokens == single.prompt_tokens
    assert usage.completion_tokens > single.completion_tokens


def test_stop_ends_the_text(client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
    whole = ask(client, "tiny", picture("red"), **fields).choices[0].message.content
    word = whole[len(whole) // 2 :][:3]
    choice = ask(client, "tiny", picture("red"), **fields, stop=[word, "never"]).choices[0]
    assert choice.message.content.rstrip() == whole[: whole.index(word)].rstrip()
    assert choice.finish_reason == "stop"


def test_a_stream_brings_each_piece_when_it_is_written(client: OpenAI, talker: Talker, quiet: Batcher) -> None:
    talker.gate.release()
    stream = ask(client, "talker", text="one two three", stream=True, stream_options={"include_usage": True})
    chunks = iter(stream)
    assert next(chunks).choices[0].delta.role == "assistant"
    assert next(chunks).choices[0].delta.content == "one "  # the engine waits at its gate for the others
    assert quiet._pipeline._in_flight
    talker.gate.release(2)
    rest = list(chunks)
    assert [chunk.choices[0].delta.content for chunk in rest[:-2]] == ["two ", "three ", "(end)"]
    assert rest[-2].choices[0].finish_reason == "stop"
    assert rest[-1].choices == []
    assert rest[-1].usage.total_tokens == 14
    assert rest[-1].usage.prompt_tokens_details.image_tokens == 6


@pytest.mark.parametrize("model", ["tiny", "attributes"])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "n": 2}
    whole = [choice.message.content for choice in ask(client, model, picture("green"), **fields).choices]
    texts, reasons = ["", ""], [None, None]
    for chunk in ask(client, model, picture("green"), **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == whole
    assert all(reasons)


def test_the_clients_own_stream_helper_understands_ours(client: OpenAI) -> None:
    content: Any = [picture("blue"), {"type": "text", "text": "Describe it."}]
    with client.chat.completions.stream(model="attributes", messages=[{"role": "user", "content": content}]) as stream:
        written = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == written
    assert written


def test_a_client_that_hangs_up_in_a_stream_drops_the_work(client: OpenAI, talker: Talker, quiet: Batcher) -> None:
    talker.gate.release()
    stream = ask(client, "talker", text="one two", stream=True)
    assert "one " in [next(stream).choices[0].delta.content for _ in range(2)]
    second = threading.Thread(target=lambda: _ignore(lambda: ask(client, "talker", text="unwanted", timeout=0.2)))
    second.start()
    wait_for(lambda: quiet.waiting == 1)
    second.join()
    (item,) = quiet._pipeline._in_flight[0]
    stream.close()
    wait_for(item.future.cancelled)
    talker.gate.release(10)
    assert ask(client, "talker", text="next").choices[0].message.content == "next (end)"
    assert talker.prompts == ["one two", "next"]


def _ignore(call: Callable[[], object]) -> None:
    with contextlib.suppress(openai.APIError):
        call()


@pytest.mark.parametrize(
    ("word", "message"),
    [("throw", "device error"), ("die", "thread killed"), ("vanish", "0 outputs for 1 requests")],
)
def test_an_engine_that_breaks_is_reported_and_goes_on(
    client: OpenAI, talker: Talker, quiet: Batcher, word: str, message: str
) -> None:
    talker.gate.release(20)
    for stream in (False, True):  # nothing was said yet, so a stream fails with a status too
        with pytest.raises(openai.InternalServerError, match=message) as caught:
            ask(client, "talker", text=word, stream=stream)
        assert caught.value.code == "engine_failed"
    assert ask(client, "talker", text="fine").choices[0].message.content == "fine (end)"


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(
    client: OpenAI, talker: Talker, quiet: Batcher
) -> None:
    talker.gate.release(20)
    said: list[str | None] = []

    def listen() -> None:
        for chunk in ask(client, "talker", text="one throw", stream=True):
            said.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="device error") as caught:
        listen()
    assert said == ["", "one "]
    assert caught.value.code == "engine_failed"


def test_an_engine_that_hangs_is_given_up_at_the_deadline(
    client: OpenAI, talker: Talker, quiet: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "_timeout_s", 0.5)
    talker.gate.release(20)
    with pytest.raises(openai.InternalServerError, match="did not answer within 0") as caught:
        ask(client, "talker", text="hang")
    assert (caught.value.status_code, caught.value.code) == (503, "deadline_exceeded")


def test_a_full_queue_is_a_rate_limit_error_that_says_when_to_come_back(
    client: OpenAI, talker: Talker, quiet: Batcher
) -> None:
    with pytest.raises(openai.RateLimitError, match="1 requests waiting, which is its limit") as caught:
        ask(client, "talker", text="wait", n=3)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert caught.value.type == "rate_limit_error"
    talker.gate.release(10)


@pytest.mark.parametrize(
    ("fields", "kind", "message", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "'gpt-9' is not served here", "model"),
        ({"n": 99}, openai.BadRequestError, "less than or equal to 16", "n"),
        ({"max_tokens": 4000}, openai.BadRequestError, "has a context of 2048", "messages"),
        ({"tools": []}, openai.BadRequestError, "'tools' is not supported here", "tools"),
        ({"top_p": 0.5}, openai.BadRequestError, "'top_p' is not supported here", "top_p"),
    ],
)
def test_what_is_refused_is_refused_in_words(
    client: OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], message: str, param: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        ask(client, **{"model": "tiny", **fields})
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_remote_picture_is_not_fetched(client: OpenAI, stream: bool) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/cat.png"}}
    with pytest.raises(openai.BadRequestError, match="not fetched") as caught:
        ask(client, "attributes", part, stream=stream)
    assert (caught.value.code, caught.value.param) == ("remote_image_url", "messages.0.content.0.image_url.url")
