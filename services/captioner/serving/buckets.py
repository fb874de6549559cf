"""One request on its way through the batcher, and the two places where requests wait in turns: unprepared by their
likely size, prepared by the engine's bucket. So a short request passes the long ones that came before it."""

import time
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from services.captioner.engines.base import CaptionRequest, Generation
from shared.errors import CaptuneError

_REMEMBERED = 256  # groups, also empty ones, whose last turns are known
#: Where retried requests wait: whatever their bucket, each goes to the device by itself.
_ALONE = object()


@dataclass(eq=False)
class Item:
    request: CaptionRequest
    deadline: float  # time.monotonic(); all have the same time, so the earliest was admitted first
    future: "Future[Generation]" = field(default_factory=Future)
    prepared: Any = None
    bucket: Hashable = None
    ready_at: float = 0.0  # when it was prepared
    alone: bool = False  # it was in a batch that failed; its second and last try is by itself
    spoke: bool = False  # part of its text went out already, so it cannot be tried again

    def __post_init__(self) -> None:
        # About the tokens to be read, 28x28 pixels each or four letters, and to be written; within a factor of two.
        pixels = sum(image.width * image.height for image in self.request.images)
        reading = pixels // 784 + len(self.request.prompt) // 4
        self.size = (reading.bit_length(), self.request.max_tokens.bit_length())
        listener = self.request.on_text
        if listener is None:
            return

        def on_text(piece: str) -> None:
            if not self.future.done():
                self.spoke = True
                listener(piece)

        self.request = replace(self.request, on_text=on_text)

    @property
    def dropped(self) -> bool:
        """Answered already, or nobody waits for the answer."""
        return self.future.done() or time.monotonic() > self.deadline

    def answer(self, outcome: Generation | CaptuneError) -> None:
        """Only the first answer counts; one may have been given up already."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Generation):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)


class Turns:
    """Requests in groups that take turns: of those asked for, the group served longest ago is next, and of it the
    oldest request. Not safe for threads: the pipeline's lock guards it. Groups are few, so a turn is a plain search."""

    def __init__(self) -> None:
        self.groups: dict[Hashable, deque[Item]] = {}  # no empty ones
        self._served: dict[Hashable, int] = {}  # group -> number of the turn when it was last served
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def __iter__(self) -> Iterator[Item]:
        for items in self.groups.values():
            yield from items

    def put(self, group: Hashable, item: Item) -> None:
        self.groups.setdefault(group, deque()).append(item)

    def next(self, among: Collection[Hashable]) -> Hashable:
        """The group whose turn it is. `among` is not empty, and none of them is."""
        return min(among, key=lambda group: (self._served.get(group, 0), self.groups[group][0].deadline))

    def take(self, group: Hashable, most: int) -> list[Item]:
        """Its oldest requests. It is served by that: the others' turns come first."""
        items = self.groups[group]
        taken = [items.popleft() for _ in range(min(len(items), most))]
        self._turn += 1
        self._served.pop(group, None)  # so that they stay in the order of their turns
        self._served[group] = self._turn
        if len(self._served) > _REMEMBERED:
            del self._served[next(iter(self._served))]
        if not items:
            del self.groups[group]
        return taken

    def sweep(self) -> list[Item]:
        """Takes out all requests that nobody waits for any more."""
        dropped: list[Item] = []
        for group, items in list(self.groups.items()):
            kept: deque[Item] = deque()
            for item in items:
                (dropped if item.dropped else kept).append(item)
            self.groups[group] = kept
            if not kept:
                del self.groups[group]
        return dropped

    def clear(self) -> list[Item]:
        """Takes out all requests."""
        everything = list(self)
        self.groups = {}
        return everything


class Waiting(Turns):
    """Requests not prepared yet, in groups of about one size."""

    def add(self, item: Item) -> None:
        self.put(item.size, item)

    def next_item(self, ahead: Collection[Item], most_of_a_size: int) -> Item | None:
        """The next to be prepared. None where so many of each size are `ahead`, prepared or being prepared."""
        counts: Counter[Hashable] = Counter(item.size for item in ahead)
        open_sizes = [size for size in self.groups if counts[size] < most_of_a_size]
        return self.take(self.next(open_sizes), 1)[0] if open_sizes else None


class Buckets(Turns):
    """Prepared requests: a batch holds one bucket, and buckets take turns.

    max_batch: requests in a full batch.
    max_wait_s: how long the first request of a batch waits for company while the device has nothing else to do.
    """

    def __init__(self, max_batch: int, max_wait_s: float) -> None:
        super().__init__()
        self.max_batch = max_batch
        self._max_wait_s = max_wait_s

    def add(self, item: Item) -> None:
        self.put(_ALONE if item.alone else item.bucket, item)

    def next_batch(self, now: float, free_since: float) -> tuple[list[Item], float | None]:
        """The next batch; or none, and the seconds until there may be one (None: nothing waits).

        A bucket is due when it fills a batch, when it was waiting before the device became free (`free_since`), or
        when its oldest request has waited `max_wait_s` for company.
        """
        due_in = {bucket: self._due_in(bucket, now, free_since) for bucket in self.groups}
        due = [bucket for bucket, seconds in due_in.items() if seconds <= 0]
        if not due:
            return [], min(due_in.values(), default=None)
        bucket = self.next(due)
        return self.take(bucket, self._size(bucket)), None

    def _size(self, bucket: Hashable) -> int:
        return 1 if bucket is _ALONE else self.max_batch

    def _due_in(self, bucket: Hashable, now: float, free_since: float) -> float:
        items = self.groups[bucket]
        oldest = items[0].ready_at
        if len(items) >= self._size(bucket) or oldest <= free_since:
            return 0.0
        return oldest + self._max_wait_s - now
