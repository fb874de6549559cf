"""Whatever bytes a model server sends mean a caption or a trouble, never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.captioner.engines.openai_replies import (
    Reply,
    Trouble,
    read_completion,
    read_models,
    read_refusal,
    retry_after,
    same_model,
)

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
_MESSAGES = st.fixed_dictionaries({}, optional={"content": _JSON, "refusal": _JSON}) | _JSON
_CHOICES = st.fixed_dictionaries({}, optional={"message": _MESSAGES, "finish_reason": _JSON}) | _JSON
_BODIES = st.binary() | (
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(_CHOICES, max_size=2) | _JSON,
            "model": st.just("tiny") | _JSON,
            "usage": st.fixed_dictionaries({}, optional={"prompt_tokens": _JSON, "completion_tokens": _JSON}) | _JSON,
            "error": st.fixed_dictionaries({}, optional={"message": _JSON, "detail": _JSON}) | _JSON,
            "data": st.lists(st.fixed_dictionaries({"id": _JSON}) | _JSON, max_size=3) | _JSON,
        },
    )
    | _JSON
).map(lambda data: json.dumps(data).encode())


@given(st.integers(100, 599), st.dictionaries(st.sampled_from(["retry-after", "content-type"]), st.text()), _BODIES)
@settings(max_examples=300)
def test_any_answer_means_something(code: int, headers: dict[str, str], body: bytes) -> None:
    outcome = read_completion(code, headers, body, "tiny")
    if isinstance(outcome, Reply):
        outcome.text.encode()
        assert "\0" not in outcome.text
        assert 0 <= outcome.prompt_tokens < 2**31
        assert 0 <= outcome.completion_tokens < 2**31
    troubles = [outcome, read_models(code, headers, body, "tiny"), read_refusal(code, headers, body)]
    for trouble in troubles:
        if isinstance(trouble, Trouble):
            trouble.words.encode()
            assert trouble.retry_after is None or 0 <= trouble.retry_after <= 86400


def test_an_endless_text_is_cut_once_its_thoughts_are_gone() -> None:
    def reply(content: str) -> Reply | Trouble:
        body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        return read_completion(200, {}, json.dumps(body).encode(), "tiny")

    assert reply("<think>" + "hm " * 10_000 + "</think>A fox.") == Reply("A fox.", "stop", 0, 0)
    assert reply("x" * 8_000) == Reply("x" * 8_000, "stop", 0, 0)
    assert reply("x" * 1_000_000) == Reply("x" * 8_000, "length", 0, 0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        (" 1.5 ", 1.5),
        ("9" * 400, 86400.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
        ("inf", None),
        (None, None),
    ],
)
def test_retry_after_header(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4", "gpt-4-0613", True),
        ("sonnet-4-latest", "sonnet-4-20250514", True),
        ("qwen2.5vl", "qwen2.5vl:latest", True),
        ("qwen2.5vl", "qwen2.5vl:72b", False),
        ("gemini-2.0-flash", "models/gemini-2.0-flash", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B-Instruct", True),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", False),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen/qwen2.5-vl-3b-instruct", True),
    ],
)
def test_same_model(asked: str, answered: str, same: bool) -> None:
    assert same_model(asked, answered) is same
