"""The threads between a request and its answer: every item put in is answered, whatever happens on the way.

    put -> [waiting] -> CPU threads: prepare -> [prepared] -> lanes: generate -> [raw] -> CPU threads: finish

One lock guards all three lists. `prepared` is bounded by a few batches, so that pixels are not unpacked for requests
whose turn is far away. A lane is a thread that calls `generate`: one for an engine that owns a device, many for one
that waits for other servers.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from services.captioner import metrics
from services.captioner.engines.base import Engine
from services.captioner.serving.buckets import Buckets, Item, Waiting
from services.captioner.serving.rate import Meter
from shared.errors import CaptuneError, Unavailable

logger = logging.getLogger(__name__)


class Pipeline:
    """Its threads run from `start` to `stop`; a stopped one may be started again.

    max_wait_s: how long the first request of a batch waits for company while the device has nothing else to do.
    cpu_threads: for `engine.prepare` and `engine.finish`.
    """

    def __init__(self, engine: Engine, meter: Meter, *, max_wait_s: float, cpu_threads: int) -> None:
        self.restarts = 0  # of lanes, and why the last one died:
        self.last_death: str | None = None
        self.stopping = threading.Event()
        self._engine, self._meter = engine, meter
        self._cpu_threads = cpu_threads
        self._lock = threading.Lock()
        self._cpu_work = threading.Condition(self._lock)  # one notification per task for a CPU thread
        self._lane_work = threading.Condition(self._lock)  # one per request that a lane may take
        self._waiting = Waiting()
        self._preparing: list[Item] = []
        self._prepared = Buckets(engine.max_batch, max_wait_s)
        self._in_flight: dict[int, Sequence[Item]] = {}  # by lane
        self._raw: deque[tuple[Item, Any]] = deque()
        self._cpu: list[threading.Thread] = []
        self._lanes: list[threading.Thread] = []
        self._lanes_running = 0

    @property
    def queued(self) -> int:
        """Items put in and not yet on the device."""
        with self._lock:
            return self._queued()

    def start(self, load: Callable[[], bool]) -> None:
        """Starts the threads. `load` is called once, on the first lane; where it returns False, that lane ends."""
        self.stopping.clear()
        with self._lock:
            self._lanes = []
            self._cpu = [
                threading.Thread(target=self._run_cpu, name=f"{self._engine.name}-cpu-{n}", daemon=True)
                for n in range(self._cpu_threads)
            ]
        self._start_lane(0, load)
        for thread in self._cpu:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Fails all that wait; lets running batches end, up to `timeout_s`, and fails what still runs then."""
        with self._lock:
            self.stopping.set()
            queued = [*self._waiting.clear(), *self._prepared.clear()]
            threads = [*self._lanes, *self._cpu]  # lanes first: what they still generate, the others finish
            self._cpu_work.notify_all()
            self._lane_work.notify_all()
        for item in queued:
            self._fail(item, self._shutting_down())
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            running = [item for batch in self._in_flight.values() for item in batch]
        for item in running:
            self._fail(item, self._shutting_down())

    def put(self, item: Item, queue_size: int) -> bool:
        """False where as many wait already, not counting those that nobody waits for. Raises once it is stopping."""
        with self._lock:
            if self.stopping.is_set():
                raise self._shutting_down()
            if not self._has_room(queue_size):
                return False
            self._waiting.add(item)
            self._cpu_work.notify()
            return True

    def has_room(self, queue_size: int) -> bool:
        """Whether `put` would take one now."""
        with self._lock:
            return self._has_room(queue_size)

    def _has_room(self, queue_size: int) -> bool:
        if self._queued() >= queue_size:
            for gone in [*self._waiting.sweep(), *self._prepared.sweep()]:
                self._expire(gone)
        return self._queued() < queue_size

    def _queued(self) -> int:
        return len(self._waiting) + len(self._preparing) + len(self._prepared)

    # CPU threads

    def _run_cpu(self) -> None:
        while (task := self._next_cpu_task()) is not None:
            task()

    def _next_cpu_task(self) -> Callable[[], None] | None:
        """Finishing comes first: its requests have waited longest. None when it is time to end."""
        with self._lock:
            while True:
                if self._raw:
                    item, raw = self._raw.popleft()
                    return partial(self._finish, item, raw)
                if waiting := self._next_waiting():
                    self._preparing.append(waiting)
                    return partial(self._prepare, waiting)
                if self.stopping.is_set() and not self._lanes_running:
                    return None
                self._cpu_work.wait()

    def _next_waiting(self) -> Item | None:
        """For each lane, a batch of one size and one to follow are prepared, and as much of other sizes."""
        on_device = self._engine.max_batch * self._engine.lanes
        ahead = [*self._preparing, *self._prepared]
        return self._waiting.next_item(ahead, 2 * on_device) if len(ahead) < 4 * on_device else None

    def _prepare(self, item: Item) -> None:
        failure: BaseException | None = None
        try:
            if not item.dropped:
                item.prepared = self._engine.prepare(item.request)
                item.bucket = self._engine.bucket(item.prepared)
                hash(item.bucket)
        except BaseException as error:
            failure = error
        item.ready_at = time.monotonic()
        with self._lock:
            self._preparing.remove(item)
            if failure is None and self.stopping.is_set():
                failure = self._shutting_down()
            if failure is None and not item.dropped:
                self._prepared.add(item)
                self._lane_work.notify()
                return
        if failure is None:
            self._expire(item)
        else:
            self._fail(item, failure)

    def _finish(self, item: Item, raw: Any) -> None:
        try:
            generation = self._engine.finish(raw)
            self._meter.count(generation)
            metrics.count_tokens(self._engine.name, generation)
        except BaseException as error:
            self._fail(item, error)
        else:
            item.answer(generation)

    # Lanes

    def _start_lane(self, lane: int, load: Callable[[], bool] | None = None) -> None:
        thread = threading.Thread(
            target=self._run_lane, args=(lane, load), name=f"{self._engine.name}-lane-{lane}", daemon=True
        )
        with self._lock:
            thread.start()
            self._lanes.append(thread)
            self._lanes_running += 1

    def start_other_lanes(self) -> None:
        """Called by `load` when the engine can generate. Raises RuntimeError where no more threads are to be had."""
        self._prepared.max_batch = self._engine.max_batch  # which it may have chosen by its device
        for lane in range(1, self._engine.lanes):
            self._start_lane(lane)

    def _run_lane(self, lane: int, load: Callable[[], bool] | None) -> None:
        try:
            if load is not None and not load():
                return
            while not self.stopping.is_set():
                try:
                    self._serve(lane)
                except BaseException as error:  # what would end the thread (SystemExit, say) ends only its batch
                    self._restart(lane, error)
        finally:
            with self._lock:
                self._lanes_running -= 1
                self._cpu_work.notify_all()

    def _serve(self, lane: int) -> None:
        while batch := self._next_batch(lane):
            self._generate(lane, batch)

    def _next_batch(self, lane: int) -> list[Item]:
        """Waits until one is due; empty when it is time to end."""
        free_since = time.monotonic()
        with self._lock:
            while not self.stopping.is_set():
                gone = self._prepared.sweep()
                for item in gone:
                    self._expire(item)
                self._cpu_work.notify(len(gone))  # room to prepare others
                batch, wait = self._prepared.next_batch(time.monotonic(), free_since)
                if batch:
                    self._in_flight[lane] = batch
                    self._cpu_work.notify(len(batch))
                    return batch
                self._lane_work.wait(wait)
            return []

    def _generate(self, lane: int, batch: Sequence[Item]) -> None:
        metrics.BATCH_SIZE.labels(self._engine.name).observe(len(batch))
        made = 0
        self._meter.begin()
        try:
            outputs = self._engine.generate([item.prepared for item in batch])
            if len(outputs) != len(batch):
                raise RuntimeError(f"the engine returned {len(outputs)} outputs for {len(batch)} requests")
            made = len(batch)
        except Exception as error:
            unforeseen = not isinstance(error, CaptuneError)
            logger.warning(
                "engine %s: a batch of %d failed: %r", self._engine.name, len(batch), error, exc_info=unforeseen
            )
            self._retry_or_fail(lane, error, "batch_failed")
            return
        finally:
            self._meter.end(made)
        with self._lock:
            del self._in_flight[lane]
            self._raw.extend(zip(batch, outputs, strict=True))
            self._cpu_work.notify(len(batch))

    def _retry_or_fail(self, lane: int, error: BaseException, reason: str) -> None:
        """One request can spoil a batch: each gets one more try by itself, and only the guilty one fails."""
        failed: list[Item] = []
        with self._lock:
            batch = self._in_flight.pop(lane, ())
            for item in batch:
                if len(batch) == 1 or item.spoke or self.stopping.is_set():
                    failed.append(item)
                else:
                    item.alone = True
                    self._prepared.add(item)
                    self._lane_work.notify()
                    metrics.RETRIES.labels(self._engine.name, reason).inc()
        for item in failed:
            self._fail(item, error)

    def _restart(self, lane: int, error: BaseException) -> None:
        logger.error("engine %s: lane %d died and is restarted", self._engine.name, lane, exc_info=error)
        cause = RuntimeError(f"the device thread died: {type(error).__name__}: {error}")
        with self._lock:
            self.restarts += 1
            self.last_death = str(cause)
        self._retry_or_fail(lane, cause, "thread_died")

    # Answers

    def _expire(self, item: Item) -> None:
        """For an item that is dropped: its client went away, or is told of the deadline."""
        if not item.future.done():
            self._fail(item, Unavailable("The request's deadline passed in the queue.", code="deadline_exceeded"))

    def _fail(self, item: Item, error: BaseException) -> None:
        if isinstance(error, CaptuneError):
            item.answer(error)
            return
        logger.error("engine %s: a request failed: %r", self._engine.name, error, exc_info=error)
        wrapped = CaptuneError(
            f"Engine {self._engine.name!r} failed on this request ({type(error).__name__}: {error}). "
            "Other requests are not affected; the server's log has the details.",
            code="engine_failed",
        )
        wrapped.__cause__ = error
        item.answer(wrapped)

    def _shutting_down(self) -> Unavailable:
        return Unavailable(f"Engine {self._engine.name!r} is shutting down. Try again shortly.", code="shutting_down")
