"""One engine as the API sees it: loaded in the background, then asked by `submit`, which always ends in an answer.

What happens behind a request is in pipeline.py (threads), buckets.py (which requests share a batch) and rate.py.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from services.captioner import metrics
from services.captioner.engines.base import CaptionRequest, Engine, Generation
from services.captioner.serving.buckets import Item
from services.captioner.serving.pipeline import Pipeline
from services.captioner.serving.rate import Meter, Rate, warm_up
from shared.errors import CaptuneError, TooBusy, Unavailable

logger = logging.getLogger(__name__)

State = Literal["stopped", "loading", "ready", "failed"]

_LOAD_RETRY_S = 30.0  # between attempts to load a model whose source is out of reach
_USUAL_RATE = 10.0  # captions/s, for Retry-After while nothing is measured


class Batcher:
    """Collects requests into device batches of at most `engine.max_batch`, each of one bucket.

    queue_size: requests that may wait for the device; more are answered 429.
    max_wait_ms: how long the first request of a batch waits for company while the device has nothing else to do.
    request_timeout_s: from `submit` to the answer; later the caller gets a 503 and the work is dropped.
    prepare_threads: CPU threads for `engine.prepare` and `engine.finish`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue_size: int = 256,
        max_wait_ms: float = 10.0,
        request_timeout_s: float = 300.0,
        prepare_threads: int = 2,
    ) -> None:
        self.engine = engine
        self.error: str | None = None  # why the state is "failed" ...
        self.gave_up = False  # ... and whether it will not try to load again
        self.started_at = int(time.time())
        self._queue_size = queue_size
        self._timeout_s = request_timeout_s
        self._state: State = "stopped"
        self._unpacking = 0
        self._meter = Meter()
        self._pipeline = Pipeline(engine, self._meter, max_wait_s=max_wait_ms / 1000, cpu_threads=prepare_threads)

    @property
    def state(self) -> State:
        return "stopped" if self._pipeline.stopping.is_set() else self._state

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def waiting(self) -> int:
        """Requests admitted and not yet on the device."""
        return self._pipeline.queued

    def rate(self) -> Rate | None:
        """Measured at warm-up, then on all that is captioned; None before."""
        return self._meter.rate()

    def status(self) -> dict[str, Any]:
        """For `/readyz`: what this engine is, whether it serves, how fast, and what went wrong."""
        rate = self.rate()
        return {
            "engine": self.engine.name,
            "revision": self.engine.revision,
            "state": self.state,
            "error": self.error,
            "waiting": self.waiting,
            "restarts": self._pipeline.restarts,
            "last_death": self._pipeline.last_death,
            "rate": None if rate is None else {name: round(value, 3) for name, value in asdict(rate).items()},
        }

    def start(self) -> None:
        """Start the threads and return at once; the engine loads on its own thread. A no-op when started."""
        if self.state != "stopped":
            return
        self._state, self.error = "loading", None
        self._pipeline.start(self._load)
        metrics.watch_queue(self.engine.name, lambda: self.waiting)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Refuse new requests, answer all waiting ones with a 503, let running batches end (up to `timeout_s`)."""
        self._pipeline.stop(timeout_s)
        metrics.unwatch(self.engine.name)

    async def submit(self, request: CaptionRequest) -> Generation:
        """The caption, or the `CaptuneError` that says why there is none. Cancelling the call drops the work."""
        name, began = self.engine.name, time.monotonic()
        item = Item(request, deadline=began + self._timeout_s)
        try:
            self._admit(item)
            generation = await self._answer(item)
        except CaptuneError as error:
            metrics.FAILURES.labels(name, error.code).inc()
            raise
        metrics.CAPTIONS.labels(name).inc()
        metrics.LATENCY.labels(name).observe(time.monotonic() - began)
        return generation

    @contextmanager
    def unpacking(self) -> Iterator[None]:
        """While a request's pictures are unpacked, it counts as waiting; one that would be refused afterwards is
        refused before. For the event loop's thread."""
        self._check()
        if not self._pipeline.has_room(self._queue_size - self._unpacking):
            raise self._full()
        self._unpacking += 1
        try:
            yield
        finally:
            self._unpacking -= 1

    def _admit(self, item: Item) -> None:
        self._check()
        if not self._pipeline.put(item, self._queue_size):
            raise self._full()

    def _check(self) -> None:
        if self.state == "loading":
            raise Unavailable(
                f"Engine {self.engine.name!r} is still loading. Try again shortly.",
                code="engine_loading",
                retry_after=5,
            )
        if self.state != "ready":
            reason = self.error or "it was stopped"
            raise Unavailable(f"Engine {self.engine.name!r} is not available: {reason}", code="engine_unavailable")

    def _full(self) -> TooBusy:
        return TooBusy(
            f"Engine {self.engine.name!r} has {self._queue_size} requests waiting, which is its limit. Try again "
            "later or send fewer at a time.",
            code="queue_full",
            retry_after=self._retry_after(),
        )

    async def _answer(self, item: Item) -> Generation:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(item.future)
        except TimeoutError:
            raise Unavailable(
                f"Engine {self.engine.name!r} did not answer within {self._timeout_s:g} s. Send fewer requests at a "
                "time or lower max_tokens.",
                code="deadline_exceeded",
                retry_after=self._retry_after(),
            ) from None

    def _retry_after(self) -> int:
        """Seconds until about half of the queue is done."""
        rate = self._meter.rate()
        pace = rate.captions_per_second if rate else _USUAL_RATE
        return max(1, min(60, math.ceil(self._queue_size / 2 / pace)))

    def _load(self) -> bool:
        """Loads and warms up, on the thread that will generate. Goes on trying where only the way to it is missing."""
        stopping, loaded = self._pipeline.stopping, False
        while not stopping.is_set():
            try:
                if not loaded:
                    self.engine.load()
                    loaded = True
                if self.engine.warms_up:
                    warm_up(self.engine, self._meter)
                metrics.watch_memory(self.engine)
                self._pipeline.start_other_lanes()
            except BaseException as error:
                again = isinstance(error, Unavailable)
                message = error.message if isinstance(error, CaptuneError) else f"{type(error).__name__}: {error}"
                logger.error("engine %s cannot be loaded: %s", self.engine.name, message, exc_info=not again)
                self._state, self.error = "failed", message
                if not again:
                    self.gave_up = True
                    return False
                stopping.wait(_LOAD_RETRY_S)
            else:
                self._state, self.error = "ready", None
                return True
        return False
