"""ETags, and answers made once for many."""

import threading
import time

import pytest

from services.evaluator.board.board_cache import Rendered, RenderedCache, etag, matches


def test_a_tag_stands_for_its_parts() -> None:
    assert etag(1, {"a": None, "b": 2}) == etag(1, {"b": 2, "a": None})
    assert etag(1, {"a": "x"}) != etag(1, {"a": "y"})
    assert etag(1).startswith('"')
    assert etag(1).endswith('"')


@pytest.mark.parametrize(
    ("sent", "match"),
    [('"x"', True), ('W/"x"', True), ('"y", "x"', True), ("*", True), ('"y"', False), ("x", False), (None, False)],
)
def test_if_none_match(sent: str | None, match: bool) -> None:
    assert matches(sent, '"x"') is match


def answer(tag: str, size: int = 1) -> Rendered:
    return Rendered(tag, b"x" * size, None)


def test_many_who_ask_at_once_are_answered_by_one_reading() -> None:
    cache, made, answers = RenderedCache(), [], []
    begin = threading.Barrier(8)

    def make() -> Rendered:
        made.append(1)
        time.sleep(0.05)
        return answer("t")

    def ask() -> None:
        begin.wait()
        answers.append(cache.get("t", make))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert answers == [answer("t")] * 8


def test_an_error_is_not_kept() -> None:
    cache = RenderedCache()

    def fail() -> Rendered:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get("t", fail)
    assert cache.get("t", lambda: answer("t")) == answer("t")


def test_what_was_read_is_kept_by_its_own_tag() -> None:
    """Something was written between the question and the reading."""
    cache = RenderedCache()
    assert cache.get("old", lambda: answer("new")) == answer("new")
    assert cache.get("new", lambda: pytest.fail("it is there")) == answer("new")
    assert cache.get("old", lambda: answer("newer")) == answer("newer")


def test_the_oldest_goes_when_it_is_full() -> None:
    cache = RenderedCache(max_bytes=10)
    for tag in ("a", "b"):
        cache.get(tag, lambda tag=tag: answer(tag, 5))  # type: ignore[misc]
    cache.get("a", lambda: pytest.fail("it is there"))
    cache.get("c", lambda: answer("c", 5))
    cache.get("a", lambda: pytest.fail("it is there"))
    assert cache.get("b", lambda: answer("again")) == answer("again")
    assert cache.get("large", lambda: answer("large", 11)).body == b"x" * 11
    cache.get("a", lambda: pytest.fail("what is larger than the cache drives nothing out"))
