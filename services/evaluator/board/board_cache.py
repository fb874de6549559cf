"""Rendered answers by their ETag, so that many pollers cost one reading of the database."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

CACHE_BYTES = 64 * 2**20


def etag(*parts: Any) -> str:
    """A strong one, quotes included, of JSON-able parts."""
    return f'"{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"'


def matches(if_none_match: str | None, tag: str) -> bool:
    """Whether the caller has it already (RFC 9110, section 13.1.2: `*`, or a list; weak tags count)."""
    if if_none_match is None:
        return False
    given = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return tag in given or "*" in given


@dataclass(frozen=True)
class Rendered:
    etag: str  # of what was read, which may be newer than what was asked for
    body: bytes
    next_id: str | None  # of the page's last row, where there are more


class RenderedCache:
    """The most recently used answers, bounded by their bytes. Of callers that want the same one at once, one makes it
    and the others wait for it: what it raises, they raise."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, Rendered] = OrderedDict()
        self._making: dict[str, Future[Rendered]] = {}
        self._lock = Lock()

    def get(self, tag: str, make: Callable[[], Rendered]) -> Rendered:
        with self._lock:
            if tag in self._kept:
                self._kept.move_to_end(tag)
                return self._kept[tag]
            making = self._making.get(tag)
            if making is None:
                mine = self._making[tag] = Future()
        if making is not None:
            return making.result()
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._making[tag]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[tag]
            self._keep(made)
        mine.set_result(made)
        return made

    def _keep(self, made: Rendered) -> None:
        if made.etag in self._kept or len(made.body) > self._max_bytes:
            return
        self._kept[made.etag] = made
        self._bytes += len(made.body)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1].body)
