"""Answers are inspected on one thread beside the event loop, as many at a time as have come in: the tokenizer counts
them at once and lets go of the interpreter meanwhile, and a hop between threads for each answer would cost about as
much as inspecting it."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from services.captioner.quality.inspect import Answer, Inspected, Inspector


class _Waiting(NamedTuple):
    answer: Answer
    inspected: asyncio.Future[Inspected]


class Inspecting:
    """For one event loop; `close` when nothing is waited for any more."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector
        self._thread = ThreadPoolExecutor(1, "inspect")
        self._waiting: list[_Waiting] = []
        self._busy = False

    def close(self) -> None:
        self._thread.shutdown()

    async def finish(self, raw: str, display_name: str, finish_reason: str) -> Inspected:
        """As `Inspector.finish`."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(Answer(raw, display_name, finish_reason), loop.create_future())
        self._waiting.append(waiting)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._start)  # what else has come in by then goes along
        return await waiting.inspected

    def _start(self) -> None:
        batch, self._waiting = self._waiting, []
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._inspect, batch)
        work.add_done_callback(lambda done: self._deliver(batch, done.result()))

    def _inspect(self, batch: Sequence[_Waiting]) -> list[Inspected | Exception]:
        try:
            return list(self._inspector.finish_all([each.answer for each in batch]))
        except Exception as error:  # of one answer, raised where that one is waited for
            if len(batch) == 1:
                return [error]
            return [found for each in batch for found in self._inspect([each])]

    def _deliver(self, batch: Sequence[_Waiting], found: Sequence[Inspected | Exception]) -> None:
        for each, inspected in zip(batch, found, strict=True):
            if each.inspected.done():  # cancelled
                continue
            if isinstance(inspected, Exception):
                each.inspected.set_exception(inspected)
            else:
                each.inspected.set_result(inspected)
        if self._waiting:
            self._start()
        else:
            self._busy = False
