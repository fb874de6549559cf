"""The `openai` engine against a real server that misbehaves: every request ends in a caption or a clear error."""

import asyncio
import base64
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from services.captioner import metrics
from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.engines.openai import OpenAIEngine
from services.captioner.serving.batcher import Batcher
from services.captioner.settings import EngineSpec
from shared.errors import CaptuneError, InvalidInput, Unavailable
from tests.openai_engine import KEY, caption, make, many
from tests.openai_server import (
    Behaviour,
    OpenAIServer,
    after,
    cut,
    drop,
    echo,
    html,
    ok,
    raw,
    status,
    trickle,
    wants_max_completion_tokens,
)


def retries(reason: str) -> float:
    return float(metrics.RETRIES.labels("remote", reason)._value.get())


# What is sent, and what comes back


def test_a_caption(server: OpenAIServer) -> None:
    stripes = Image.new("RGB", (400, 300), "blue")
    for x in range(0, 400, 2):
        stripes.paste((255, 0, 0), (x, 0, x + 1, 300))
    engine = make(server, max_pixels=400 * 300)
    assert (engine.lanes, engine.max_batch, engine.warms_up) == (64, 1, False)
    result = caption(engine, images=(stripes,), max_tokens=40, temperature=0.7, seed=5, stop=("\n\n",))
    assert result == Generation("a red fox", "stop", 11, 3)

    [seen] = server.seen
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    [message] = seen.body.pop("messages")
    assert seen.body == {"model": "tiny", "temperature": 0.7, "max_tokens": 40, "seed": 5, "stop": ["\n\n"]}
    picture, text = message["content"]
    assert text == {"type": "text", "text": "Describe the fox."}
    head, _, payload = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(payload)))
    assert sent.size == (400, 300)
    # Columns of one pixel keep their own colours: with halved chroma all of them would be violet.
    red, blue = sent.getpixel((200, 150)), sent.getpixel((201, 150))
    assert isinstance(red, tuple)
    assert isinstance(blue, tuple)
    assert red[0] > 200 > 60 > red[2]
    assert blue[2] > 200 > 60 > blue[0]


def test_large_pictures_are_scaled_down_and_options_left_out_are_not_sent(server: OpenAIServer) -> None:
    caption(make(server, max_pixels=10_000), images=(Image.new("RGB", (800, 200)),))
    body = server.seen[0].body
    payload = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(payload))).size == (200, 50)
    assert set(body) == {"model", "messages", "temperature", "max_tokens"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ok(finish_reason="length"), Generation("a red fox", "length", 11, 3)),
        (ok(usage=None), Generation("a red fox", "stop", 0, 0)),
        (ok(usage={"prompt_tokens": -1, "completion_tokens": 10**30}), Generation("a red fox", "stop", 0, 0)),
        (ok(text="<think>A fox? Yes.</think>\n\nA fox."), Generation("A fox.", "stop", 11, 3)),
        (ok(text="a \ud800fox\0"), Generation("a \ufffdfox\ufffd", "stop", 11, 3)),
        (
            ok(message={"content": [{"type": "text", "text": "a "}, {"type": "x"}, {"type": "text", "text": "fox"}]}),
            Generation("a fox", "stop", 11, 3),
        ),
        (ok(message={"content": None, "refusal": "I cannot."}), Generation("I cannot.", "stop", 11, 3)),
        (ok(model="tiny-2024-08-06"), Generation("a red fox", "stop", 11, 3)),
        (ok(model=None), Generation("a red fox", "stop", 11, 3)),
    ],
)
def test_answers_of_many_shapes(server: OpenAIServer, answer: Behaviour, expected: Generation) -> None:
    server.script.append(answer)
    assert caption(make(server)) == expected
    assert len(server.seen) == 1


def test_a_text_ends_before_the_first_stop_even_where_the_server_ignores_it(server: OpenAIServer) -> None:
    server.script.append(ok(text="One fox. Two foxes. END three", finish_reason="length"))
    assert caption(make(server), stop=("END", "Two")) == Generation("One fox.", "stop", 11, 3)


@pytest.mark.parametrize("empty", [ok(text=""), ok(message={"content": None}), ok(text="<think>hm</think> ")])
def test_an_empty_text_is_asked_for_once_more(server: OpenAIServer, empty: Behaviour) -> None:
    engine, before = make(server), retries("empty")
    server.script.extend([empty, ok(text="second")])
    assert caption(engine).text == "second"
    server.script.extend([empty, empty, ok(text="third")])
    assert caption(engine).text == ""
    assert len(server.seen) == 4
    assert retries("empty") == before + 2


def test_a_text_withheld_by_a_filter_is_empty_and_not_asked_for_again(
    server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.script.append(ok(text="", finish_reason="content_filter"))
    assert caption(make(server)) == Generation("", "stop", 11, 3)
    assert len(server.seen) == 1
    assert "content_filter" in caplog.text


def test_the_other_name_of_the_token_limit_is_learnt_once(server: OpenAIServer) -> None:
    server.otherwise = wants_max_completion_tokens
    engine = make(server)
    assert caption(engine, max_tokens=33).text == "limit 33"
    assert caption(engine, max_tokens=44).text == "limit 44"
    assert len(server.seen) == 3


# Servers that misbehave


@pytest.mark.parametrize(
    ("misbehaviour", "reason"),
    [
        (status(500), "server_error"),
        (status(502), "server_error"),
        (status(503), "overloaded"),
        (status(429), "rate_limited"),
        (cut, "cut_off"),
        (drop, "cut_off"),
        (html, "bad_body"),
        (raw(b'{"choices": [{"mess'), "bad_body"),
        (raw(b"\xff\xfe\x00"), "bad_body"),
        (raw(b"[" * 100_000), "bad_body"),
        (raw(b""), "bad_body"),
        (raw(b'["choices"]'), "bad_body"),
        (raw(b'{"error": {"message": "upstream gone"}}'), "server_error"),
        (ok(choices=0), "wrong_count"),
        (ok(choices=2), "wrong_count"),
        (ok(message={"content": {"text": "a"}}), "bad_body"),
        (raw(b'{"choices": [7]}'), "bad_body"),
    ],
)
def test_what_a_server_breaks_is_tried_again(server: OpenAIServer, misbehaviour: Behaviour, reason: str) -> None:
    engine, before = make(server), retries(reason)
    server.script.append(misbehaviour)
    assert caption(engine).text == "a red fox"
    assert len(server.seen) == 2
    assert retries(reason) == before + 1


@pytest.mark.parametrize("never", [after(60), trickle])
def test_a_try_that_takes_too_long_is_given_up(server: OpenAIServer, never: Behaviour) -> None:
    engine, before = make(server, timeout_s=0.4), retries("timeout")
    server.script.append(never)
    began = time.monotonic()
    assert caption(engine).text == "a red fox"
    assert 0.3 < time.monotonic() - began < 2
    assert retries("timeout") == before + 1


def test_several_failures_in_a_row_are_ridden_out(server: OpenAIServer) -> None:
    server.script.extend([status(500)] * 5)
    assert caption(make(server)).text == "a red fox"
    assert len(server.seen) == 6


@pytest.mark.parametrize(
    ("broken", "code"), [(status(500), "server_error"), (after(60), "timeout"), (html, "bad_body")]
)
def test_tries_end_with_patience(server: OpenAIServer, broken: Behaviour, code: str) -> None:
    engine = make(server, timeout_s=0.4)
    server.otherwise = broken
    began = time.monotonic()
    with pytest.raises(Unavailable) as error:
        caption(engine)
    assert error.value.code in (code, "no_model_server")
    assert f"127.0.0.1:{server.port}" in error.value.message
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(server: OpenAIServer, as_date: bool) -> None:
    engine = make(server)
    then = datetime.now(UTC) + timedelta(seconds=2)  # dates are whole seconds: at least one is left
    value = format_datetime(then, usegmt=True) if as_date else "1"
    server.script.append(status(429, Retry_After=value))
    assert caption(engine).text == "a red fox"
    first, second = (seen.at for seen in server.seen)
    assert second - first > (0.9 if as_date else 0.99)


def test_a_long_retry_after_ends_the_request_at_once_and_is_passed_on(server: OpenAIServer) -> None:
    engine = make(server)
    server.script.append(status(429, "quota used up", Retry_After="300"))
    began = time.monotonic()
    with pytest.raises(Unavailable) as error:
        caption(engine)
    assert time.monotonic() - began < 1
    assert "quota used up" in error.value.message
    assert error.value.retry_after is not None
    assert 299 <= error.value.retry_after <= 331
    assert len(server.seen) == 1


@pytest.mark.parametrize("code", [400, 413, 415, 422])
def test_a_refusal_is_for_this_request_only(server: OpenAIServer, code: int) -> None:
    engine = make(server)
    server.script.append(status(code, f"the picture of {KEY} is " + "too large " * 100))
    with pytest.raises(InvalidInput) as error:
        caption(engine)
    assert f"answered {code}: the picture of [api_key] is too large" in error.value.message
    assert len(error.value.message) < 400
    assert len(server.seen) == 1
    assert caption(engine).text == "a red fox"


@pytest.mark.parametrize(
    "body", [b'{"detail": [{"msg": "too big"}]}', b'{"error": "too big"}', b'{"message":"too big"}']
)
def test_the_words_of_other_error_shapes_are_found(server: OpenAIServer, body: bytes) -> None:
    server.script.append(raw(body, code=400))
    with pytest.raises(InvalidInput, match="answered 400: too big"):
        caption(make(server))


def test_an_unknown_model_or_path_is_told(server: OpenAIServer) -> None:
    engine = make(server)
    server.script.append(status(404, "The model `tiny` does not exist."))
    with pytest.raises(InvalidInput, match="The model `tiny` does not exist") as error:
        caption(engine)
    assert error.value.code == "not_found"


def test_another_models_answer_is_refused(server: OpenAIServer) -> None:
    engine = make(server)
    server.script.append(ok(model="tiny-mini"))
    with pytest.raises(Unavailable, match="'tiny-mini' answered") as error:
        caption(engine)
    assert error.value.code == "wrong_model"
    assert len(server.seen) == 1


# Loading


def test_loading_names_what_is_served(server: OpenAIServer) -> None:
    server.served = ("big", "small")
    with pytest.raises(InvalidInput, match="does not serve model 'tiny'; it serves: big, small") as error:
        make(server)
    assert error.value.code == "model_not_served"


def test_a_server_that_is_not_there_may_come_later() -> None:
    with OpenAIServer() as gone:
        pass
    engine = make(gone, load=False)
    with pytest.raises(Unavailable, match=f"127.0.0.1:{gone.port} cannot be reached"):
        engine.load()
    with OpenAIServer(port=gone.port):
        engine.load()
        assert caption(engine).text == "a red fox"


@pytest.mark.parametrize("code", [404, 405])
def test_a_server_without_a_list_of_models_is_accepted(
    server: OpenAIServer, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.models = status(code)
    assert caption(make(server)).text == "a red fox"
    assert f"no list of models ({code})" in caplog.text


@pytest.mark.parametrize(
    ("models", "code"),
    [(status(401), "key_refused"), (status(503), "overloaded"), (html, "bad_body"), (raw(b'{"data": 3}'), "bad_body")],
)
def test_a_server_that_lists_badly_is_not_ready(server: OpenAIServer, models: Behaviour, code: str) -> None:
    server.models = models
    with pytest.raises(Unavailable) as error:
        make(server)
    assert error.value.code == code
    assert KEY not in error.value.message


def test_one_server_of_several_is_enough(server: OpenAIServer) -> None:
    with OpenAIServer() as gone:
        pass
    with OpenAIServer(served=("other",)) as other:
        engine = make(gone, other, server)
        assert [result.text for result in many(engine, 12)] == ["a red fox"] * 12
        assert len(server.seen) == 12
        assert other.seen == []


def test_the_revision_tells_what_changes_captions_and_nothing_secret(server: OpenAIServer) -> None:
    plain, told = make(server), make(server, revision="weights of 3 May", max_pixels=5000)
    assert plain.revision == "openai tiny max_pixels=1048576 openai1"
    assert told.revision == "openai tiny weights of 3 May max_pixels=5000 openai1"


def test_what_the_operator_adds_goes_with_each_request_and_into_the_revision(server: OpenAIServer) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 1}
    engine = make(server, extra_body=extra)
    caption(engine, temperature=0.5)
    caption(engine)
    for seen in server.seen:
        assert seen.body.items() >= extra.items()
        assert seen.body["model"] == "tiny"
    turned = make(server, extra_body=dict(reversed(extra.items())))
    other = make(server, extra_body={"top_k": 2})
    assert engine.revision == turned.revision != other.revision
    assert engine.revision.startswith("openai tiny max_pixels=1048576 openai1 extra=")


@pytest.mark.parametrize("field", ["model", "messages", "stream", "n", "temperature", "max_tokens"])
def test_what_each_request_says_itself_cannot_be_added(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} cannot be set here"):
        EngineSpec(type="openai", extra_body={"top_k": 1, field: 1})


# The batcher, and anything at all


def test_through_the_batcher(server: OpenAIServer) -> None:
    server.otherwise = after(0.03, echo)
    server.script.extend([status(500), cut, status(429), status(400, "a bad picture")])
    batcher = Batcher(make(server, concurrency=12, load=False))
    batcher.start()
    try:
        while not batcher.ready:
            time.sleep(0.01)

        async def ask() -> list[Any]:
            requests = [CaptionRequest((Image.new("RGB", (64, 48)),), f"prompt {n}") for n in range(60)]
            return await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)

        outcomes = asyncio.run(ask())
    finally:
        batcher.stop()
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert [type(outcome) for outcome in refused] == [InvalidInput]
    assert Counter(outcome.text for outcome in outcomes if isinstance(outcome, Generation)) <= Counter(
        f"prompt {n}" for n in range(60)
    )
    assert 6 < server.peak <= 12


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
_BODIES = st.binary() | _JSON.map(lambda data: json.dumps(data).encode())


@pytest.fixture(scope="module")
def lasting() -> Iterator[tuple[OpenAIServer, OpenAIEngine]]:
    with OpenAIServer() as running:
        yield running, make(running)


@given(body=_BODIES, code=st.sampled_from([200, 200, 200, 204, 400, 404, 429, 500]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_becomes_a_caption_or_a_clear_error(
    lasting: tuple[OpenAIServer, OpenAIEngine], body: bytes, code: int
) -> None:
    server, engine = lasting
    server.script.append(raw(body, code=code))
    with suppress(CaptuneError):
        assert isinstance(caption(engine), Generation)
    server.script.clear()
