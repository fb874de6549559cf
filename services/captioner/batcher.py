"""One engine's queue, threads and promises: every admitted request is answered, whatever happens behind it.

    submit -> [waiting] -> CPU threads: prepare -> [prepared] -> device thread: generate -> [raw] -> CPU threads: finish

One lock guards all three lists. `waiting` is bounded by the queue size (beyond it: 429), `prepared` by two batches, so
that pixels are not unpacked for requests whose turn is far away.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

from services.captioner.engines.base import CaptionRequest, Engine, Generation
from shared.errors import CaptuneError, TooBusy, Unavailable

logger = logging.getLogger(__name__)

State = Literal["stopped", "loading", "ready", "failed"]

_LOAD_RETRY_S = 30.0  # between attempts to load a model whose source is out of reach


@dataclass(eq=False)
class _Item:
    request: CaptionRequest
    deadline: float  # time.monotonic()
    future: "Future[Generation]" = field(default_factory=Future)
    prepared: Any = None
    prepared_at: float = 0.0
    alone: bool = False  # it was in a batch that failed; its second and last try is by itself

    @property
    def dropped(self) -> bool:
        """Answered already, or nobody waits for the answer."""
        return self.future.done() or time.monotonic() > self.deadline


class Batcher:
    """Collects requests into device batches of at most `engine.max_batch`.

    queue_size: requests that may wait for the device.
    max_wait_ms: how long the first request of a batch waits for company.
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
        self.error: str | None = None  # why the state is "failed"
        self.restarts = 0  # of the device thread, and why it died the last time:
        self.last_death: str | None = None
        self.started_at = int(time.time())
        self._queue_size = queue_size
        self._max_wait_s = max_wait_ms / 1000
        self._timeout_s = request_timeout_s
        self._cpu_threads = prepare_threads
        self._changed = threading.Condition()
        self._state: State = "stopped"
        self._stopping = threading.Event()
        self._waiting: deque[_Item] = deque()
        self._prepared: deque[_Item] = deque()
        self._raw: deque[tuple[_Item, Any]] = deque()
        self._in_flight: Sequence[_Item] = ()
        self._threads: list[threading.Thread] = []
        self._device_thread: threading.Thread | None = None
        self._device_running = False
        self._seconds_per_item = 0.1  # moving average, for Retry-After

    @property
    def state(self) -> State:
        return self._state

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    def status(self) -> dict[str, Any]:
        """For `/readyz`: what this engine is, whether it serves, and what went wrong."""
        return {
            "engine": self.engine.name,
            "revision": self.engine.revision,
            "state": self._state,
            "error": self.error,
            "waiting": self.waiting,
            "restarts": self.restarts,
            "last_death": self.last_death,
        }

    @property
    def waiting(self) -> int:
        """Requests admitted and not yet on the device."""
        with self._changed:
            return len(self._waiting) + len(self._prepared)

    def start(self) -> None:
        """Start the threads and return at once; the engine loads on the device thread. A no-op when started."""
        with self._changed:
            if self._state != "stopped":
                return
            self._state, self.error = "loading", None
            self._stopping.clear()
            self._threads = [
                threading.Thread(target=self._run_cpu, name=f"{self.engine.name}-cpu-{n}", daemon=True)
                for n in range(self._cpu_threads)
            ]
            self._start_device_thread()
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Refuse new requests, answer all waiting ones with a 503, let the running batch end (up to `timeout_s`)."""
        self._stopping.set()
        with self._changed:
            self._state = "stopped"
            queued = [*self._waiting, *self._prepared]
            self._waiting.clear()
            self._prepared.clear()
            self._changed.notify_all()
        for item in queued:
            self._fail(item, self._shutting_down())
        deadline = time.monotonic() + timeout_s
        # The device thread first: what it still generates is finished by the CPU threads.
        for thread in [self._device_thread, *self._threads]:
            if thread is not None and thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        for item in self._in_flight:
            self._fail(item, self._shutting_down())

    async def submit(self, request: CaptionRequest) -> Generation:
        """The caption, or the `CaptuneError` that says why there is none. Cancelling the call drops the work."""
        item = _Item(request, deadline=time.monotonic() + self._timeout_s)
        with self._changed:
            self._admit(item)
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

    def _admit(self, item: _Item) -> None:
        if self._state == "loading":
            raise Unavailable(
                f"Engine {self.engine.name!r} is still loading. Try again shortly.",
                code="engine_loading",
                retry_after=5,
            )
        if self._state != "ready":
            reason = self.error or "it was stopped"
            raise Unavailable(f"Engine {self.engine.name!r} is not available: {reason}", code="engine_unavailable")
        if len(self._waiting) + len(self._prepared) >= self._queue_size:
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.dropped)
            self._prepared = deque(prepared for prepared in self._prepared if not prepared.dropped)
        if len(self._waiting) + len(self._prepared) >= self._queue_size:
            raise TooBusy(
                f"Engine {self.engine.name!r} has {self._queue_size} requests waiting, which is its limit. Try again "
                "later or send fewer at a time.",
                code="queue_full",
                retry_after=self._retry_after(),
            )
        self._waiting.append(item)
        self._changed.notify_all()

    def _retry_after(self) -> int:
        """Seconds until about half of the queue is done."""
        return max(1, min(60, math.ceil(self._queue_size / 2 * self._seconds_per_item)))

    # CPU threads

    def _run_cpu(self) -> None:
        while (task := self._next_cpu_task()) is not None:
            task()

    def _next_cpu_task(self) -> Callable[[], None] | None:
        """Finishing comes first: its requests have waited longest. None when it is time to end."""
        with self._changed:
            while True:
                if self._raw:
                    item, raw = self._raw.popleft()
                    return lambda: self._finish(item, raw)
                if self._waiting and len(self._prepared) < 2 * self.engine.max_batch:
                    waiting = self._waiting.popleft()
                    return lambda: self._prepare(waiting)
                if self._stopping.is_set() and not self._device_running:
                    return None
                self._changed.wait()

    def _prepare(self, item: _Item) -> None:
        if item.dropped:
            return
        try:
            item.prepared = self.engine.prepare(item.request)
        except BaseException as error:
            self._fail(item, error)
            return
        item.prepared_at = time.monotonic()
        with self._changed:
            if not self._stopping.is_set():
                self._prepared.append(item)
                self._changed.notify_all()
                return
        self._fail(item, self._shutting_down())

    def _finish(self, item: _Item, raw: Any) -> None:
        try:
            generation = self.engine.finish(raw)
        except BaseException as error:
            self._fail(item, error)
        else:
            _resolve(item.future, generation)

    # The device thread

    def _start_device_thread(self) -> None:
        self._device_thread = threading.Thread(target=self._run_device, name=f"{self.engine.name}-device", daemon=True)
        self._device_running = True
        self._device_thread.start()

    def _run_device(self) -> None:
        try:
            if self._state == "loading" and not self._load():
                return
            while batch := self._next_batch():
                self._generate(batch)
        except BaseException as error:  # the thread ends, its duties do not
            self._device_thread_died(error)
        finally:
            with self._changed:
                if self._device_thread is threading.current_thread():  # else a successor has taken over
                    self._device_running = False
                self._changed.notify_all()

    def _load(self) -> bool:
        while not self._stopping.is_set():
            try:
                self.engine.load()
            except BaseException as error:
                again = isinstance(error, Unavailable)
                message = error.message if isinstance(error, CaptuneError) else f"{type(error).__name__}: {error}"
                logger.error("engine %s cannot be loaded: %s", self.engine.name, message, exc_info=not again)
                self._become("failed", message)
                if not again:
                    return False
                self._stopping.wait(_LOAD_RETRY_S)
            else:
                self._become("ready", None)
                return True
        return False

    def _become(self, state: State, error: str | None) -> None:
        with self._changed:
            if not self._stopping.is_set():
                self._state, self.error = state, error

    def _next_batch(self) -> list[_Item]:
        """Waits for the first request and then, at most `max_wait_ms` from when it was ready, for a full batch."""
        with self._changed:
            while True:
                self._prepared = deque(item for item in self._prepared if not self._drop(item))
                if self._stopping.is_set():
                    return []
                if not self._prepared:
                    self._changed.wait()
                    continue
                first = self._prepared[0]
                together = [item for item in self._prepared if not item.alone][: self.engine.max_batch]
                left = first.prepared_at + self._max_wait_s - time.monotonic()
                if first.alone:
                    batch = [first]
                elif len(together) >= self.engine.max_batch or left <= 0:
                    batch = together
                else:
                    self._changed.wait(left)
                    continue
                taken = set(map(id, batch))
                self._prepared = deque(item for item in self._prepared if id(item) not in taken)
                self._in_flight = batch
                self._changed.notify_all()  # room for the CPU threads to prepare more
                return batch

    def _drop(self, item: _Item) -> bool:
        if item.dropped and not item.future.done():
            self._fail(item, Unavailable("The request's deadline passed in the queue.", code="deadline_exceeded"))
        return item.dropped

    def _generate(self, batch: Sequence[_Item]) -> None:
        started = time.monotonic()
        try:
            outputs = self.engine.generate([item.prepared for item in batch])
            if len(outputs) != len(batch):
                raise RuntimeError(f"the engine returned {len(outputs)} outputs for {len(batch)} requests")
        except Exception as error:
            logger.warning("engine %s: a batch of %d failed: %r", self.engine.name, len(batch), error, exc_info=True)
            self._retry_or_fail(batch, error)
            return
        pace = (time.monotonic() - started) / len(batch)
        self._seconds_per_item += 0.2 * (pace - self._seconds_per_item)
        with self._changed:
            self._in_flight = ()
            self._raw.extend(zip(batch, outputs, strict=True))
            self._changed.notify_all()

    def _retry_or_fail(self, batch: Sequence[_Item], error: BaseException) -> None:
        """One request can spoil a batch: each gets one more try by itself, and only the guilty one fails."""
        retry = [item for item in batch if len(batch) > 1 and not self._stopping.is_set()]
        with self._changed:
            self._in_flight = ()
            for item in reversed(retry):
                item.alone = True
                self._prepared.appendleft(item)
        if not retry:
            for item in batch:
                self._fail(item, error)

    def _device_thread_died(self, error: BaseException) -> None:
        logger.error("engine %s: the device thread died and is restarted", self.engine.name, exc_info=error)
        batch = self._in_flight
        cause = RuntimeError(f"the device thread died: {type(error).__name__}: {error}")
        self._retry_or_fail(batch, cause)
        with self._changed:
            self.restarts += 1
            self.last_death = str(cause)
            if not self._stopping.is_set():
                self._start_device_thread()

    def _fail(self, item: _Item, error: BaseException) -> None:
        if isinstance(error, CaptuneError):
            _resolve(item.future, error)
            return
        logger.error("engine %s: a request failed: %r", self.engine.name, error, exc_info=error)
        wrapped = CaptuneError(
            f"Engine {self.engine.name!r} failed on this request ({type(error).__name__}: {error}). "
            "Other requests are not affected; the server's log has the details.",
            code="engine_failed",
        )
        wrapped.__cause__ = error
        _resolve(item.future, wrapped)

    def _shutting_down(self) -> Unavailable:
        return Unavailable(f"Engine {self.engine.name!r} is shutting down. Try again shortly.", code="shutting_down")


def _resolve(future: "Future[Generation]", outcome: Generation | CaptuneError) -> None:
    try:
        if isinstance(outcome, Generation):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        pass  # the client went away, or the deadline passed, in the meantime
