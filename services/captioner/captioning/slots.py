"""How many requests may be in flight: fewer after a server said that it has too many, slowly more as it answers."""

import asyncio
import time
from collections import deque
from typing import Self

NARROW_SECONDS = 1.0  # refusals within this time are one event: what they tell was sent before the limit fell
RECOVERY = 1 / 8  # of a slot, gained with each answer


class Slots:
    """An `async with` holds one slot; who waits is served in order. For one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._narrowed = float("-inf")

    def narrow(self) -> None:
        now = time.monotonic()
        if now - self._narrowed >= NARROW_SECONDS:
            self._narrowed, self.limit = now, max(1.0, self.limit / 2)

    def widen(self) -> None:
        self.limit = min(float(self.most), self.limit + RECOVERY)
        self._wake()

    async def __aenter__(self) -> Self:
        if self._used < int(self.limit) and not self._waiting:
            self._used += 1
            return self
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was given and nobody is left to use it
                await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._used -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._used < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)
