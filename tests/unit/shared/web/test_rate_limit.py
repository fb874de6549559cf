"""What is counted under one name, and that what is remembered stays small. The counting itself: test_rate_limits.py."""

import time

import pytest

from shared.web import rate_limit
from shared.web.rate_limit import Counter, Limit, _address


@pytest.mark.parametrize(
    ("text", "limit"),
    [("600/second", Limit(600, 1)), ("1/minute", Limit(1, 60)), ("9/hour", Limit(9, 3600)), ("off", None)],
)
def test_a_limit_is_read(text: str, limit: Limit | None) -> None:
    assert Limit.parse(text) == limit


def test_one_client_has_one_name() -> None:
    assert _address("10.0.0.1") != _address("10.0.0.2")
    assert _address("::ffff:10.0.0.1") == _address("10.0.0.1")
    assert _address("2001:db8:1:2::1") == _address("2001:db8:1:2:ffff::9"), "one client has every address of a /64"
    assert _address("2001:db8:1:2::1") != _address("2001:db8:1:3::1")
    assert _address(None) != _address("10.0.0.1")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "REMEMBERED", 3)
    counter = Counter("redis://unused")
    counter._count = lambda keys, args: [2, 60_000]  # type: ignore[assignment]
    for number in range(10):
        assert counter.hit(f"address:{number}", Limit(1, 60)) == 60
    assert len(counter._refused) == 3
    assert counter.refused("address:9") == 60
    assert counter.refused("address:0") == 0


def test_a_refusal_ends_with_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter("redis://unused")
    counter._count = lambda keys, args: [2, 1_500]  # type: ignore[assignment]
    assert counter.hit("key:1", Limit(1, 60)) == 2
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.4)
    assert counter.refused("key:1") == 1
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.6)
    assert counter.refused("key:1") == 0
