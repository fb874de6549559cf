"""What a model thought aloud is not in the caption."""

import time

import pytest

from services.captioner.engines.thinking import strip_thinking


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("  A fox. ", "A fox."),
        ("<think>Is it?</think>A fox.", "A fox."),
        ("Is it? It is.</think>\n\nA fox.", "A fox."),
        ("A fox. <THINK>But maybe", "A fox."),
        ("<think>one <think>two</think> three</think> A fox.", "A fox."),
        ("\u25c1think\u25b7hm\u25c1/think\u25b7A fox.", "A fox."),
        ("<think></think>", ""),
        ("a < b, thinking > c", "a < b, thinking > c"),
    ],
)
def test_strip_thinking(text: str, left: str) -> None:
    assert strip_thinking(text) == left


def test_strip_thinking_takes_no_longer_than_the_text_is_long() -> None:
    began = time.monotonic()
    strip_thinking("<think>" * 200_000)
    assert time.monotonic() - began < 3
