"""An engine that answers with the prompt, and misbehaves when the prompt asks for it."""

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from services.captioner.engines.base import CaptionRequest, Engine, Generation
from services.captioner.serving.batcher import Batcher
from services.captioner.settings import EngineSpec
from shared.errors import InvalidInput


class Echo(Engine):
    """A step fails on certain prompts; "long ..." has a bucket of its own. The gate holds the device while closed."""

    warms_up = False

    def __init__(self, max_batch: int = 4, lanes: int = 1) -> None:
        super().__init__(EngineSpec(max_batch=max_batch), "echo")
        self.lanes = lanes
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.load_errors: list[BaseException] = []
        self.loads = 0

    def load(self) -> None:
        self.gate.wait()
        self.loads += 1
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.revision = "echo-1"

    def prepare(self, request: CaptionRequest) -> CaptionRequest:
        if request.prompt == "unreadable":
            raise InvalidInput("this picture cannot be read", code="unreadable")
        return request

    def bucket(self, prepared: CaptionRequest) -> Hashable:
        if prepared.prompt == "unsortable":
            return []  # type: ignore[return-value]
        return prepared.prompt.startswith("long")

    def generate(self, prepared: Sequence[CaptionRequest]) -> list[str]:
        prompts = [request.prompt for request in prepared]
        self.batches.append(prompts)
        self.entered.release()
        for request in prepared:
            if request.on_text:
                request.on_text(request.prompt[:3].upper())
        self.gate.wait()
        if "boom" in prompts:
            raise RuntimeError("device error")
        if "die" in prompts:
            raise SystemExit("thread killed")
        return prompts[: -1 if "lost" in prompts else None]

    def finish(self, raw: str) -> Generation:
        if raw == "undecodable":
            raise UnicodeError("bad bytes")
        return Generation(raw.upper(), "stop", prompt_tokens=5, completion_tokens=2, image_tokens=3)

    @property
    def seen(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


@contextmanager
def serving(engine: Echo) -> Iterator[Callable[..., Batcher]]:
    """`make(lanes=1, **options)` gives a started batcher that is no longer loading; all are stopped in the end."""
    started: list[Batcher] = []

    def make(lanes: int = 1, **options: Any) -> Batcher:
        engine.lanes = lanes
        batcher = Batcher(engine, **{"max_wait_ms": 20.0, **options})
        batcher.start()
        wait_for(lambda: batcher.state != "loading")
        started.append(batcher)
        return batcher

    yield make
    engine.gate.set()
    for batcher in started:
        batcher.stop()


def request(prompt: str) -> CaptionRequest:
    return CaptionRequest((), prompt)


async def submit_all(batcher: Batcher, prompts: Sequence[str]) -> list[str | BaseException]:
    outcomes = await asyncio.gather(*(batcher.submit(request(p)) for p in prompts), return_exceptions=True)
    return [outcome.text if isinstance(outcome, Generation) else outcome for outcome in outcomes]
