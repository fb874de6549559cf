"""The batcher's promise: every admitted request is answered, and no request pays for another's fault."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from services.captioner import batcher as batcher_module
from services.captioner.batcher import Batcher
from services.captioner.engines.base import CaptionRequest, Engine, Generation
from services.captioner.settings import EngineSpec
from shared.errors import CaptuneError, InvalidInput, TooBusy, Unavailable


class Echo(Engine):
    """Answers with the prompt; some prompts make a step misbehave. The gate holds the device while closed."""

    def __init__(self, max_batch: int = 4) -> None:
        super().__init__(EngineSpec(max_batch=max_batch), "echo")
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.load_errors: list[BaseException] = []

    def load(self) -> None:
        self.gate.wait()
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.revision = "echo-1"

    def prepare(self, request: CaptionRequest) -> str:
        if request.prompt == "unreadable":
            raise InvalidInput("this picture cannot be read", code="unreadable")
        return request.prompt

    def generate(self, prepared: Sequence[str]) -> list[str]:
        self.batches.append(list(prepared))
        self.entered.release()
        self.gate.wait()
        if "boom" in prepared:
            raise RuntimeError("device error")
        if "die" in prepared:
            raise SystemExit("thread killed")
        return list(prepared)[: -1 if "lost" in prepared else None]

    def finish(self, raw: str) -> Generation:
        if raw == "undecodable":
            raise UnicodeError("bad bytes")
        return Generation(raw.upper(), "stop", 1, 1)

    @property
    def seen(self) -> list[str]:
        return [prompt for batch in self.batches for prompt in batch]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


@pytest.fixture
def engine() -> Echo:
    return Echo()


@pytest.fixture
def start(engine: Echo) -> Iterator[Callable[..., Batcher]]:
    started: list[Batcher] = []

    def make(**options: Any) -> Batcher:
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


def test_requests_share_batches_and_each_gets_its_own_answer(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=500)
    prompts = [f"p{n}" for n in range(12)]
    assert asyncio.run(submit_all(batcher, prompts)) == [prompt.upper() for prompt in prompts]
    assert sorted(engine.seen) == sorted(prompts)
    assert max(map(len, engine.batches)) == 4  # full batches, never more than max_batch
    assert len(engine.batches) == 3


def test_a_lone_request_waits_no_longer_than_max_wait(start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=50)
    began = time.monotonic()
    assert asyncio.run(submit_all(batcher, ["only"])) == ["ONLY"]
    assert 0.04 < time.monotonic() - began < 2


def test_full_queue_is_refused_with_retry_after(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(queue_size=3, max_wait_ms=0)
    engine.gate.clear()

    async def scenario() -> None:
        held = [asyncio.create_task(batcher.submit(request("held")))]
        await asyncio.to_thread(engine.entered.acquire)  # the device is busy with it; it left the queue
        held += [asyncio.create_task(batcher.submit(request(f"q{n}"))) for n in range(3)]
        await asyncio.sleep(0.02)
        assert batcher.waiting == 3
        with pytest.raises(TooBusy) as caught:
            await batcher.submit(request("one too many"))
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        held[1].cancel()  # a client that went away gives its place back, at the latest when it is needed
        await asyncio.sleep(0.02)
        held.append(asyncio.create_task(batcher.submit(request("fits now"))))
        await asyncio.sleep(0.02)
        engine.gate.set()
        results = await asyncio.gather(*held, return_exceptions=True)
        assert [isinstance(result, Generation) for result in results] == [True, False, True, True, True]

    asyncio.run(scenario())
    assert "q0" not in engine.seen


def test_deadline_answers_the_caller_and_drops_the_work(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(request_timeout_s=0.15, max_wait_ms=0)
    engine.gate.clear()

    async def scenario() -> list[Any]:
        first = asyncio.create_task(batcher.submit(request("on the device")))
        await asyncio.to_thread(engine.entered.acquire)
        second = asyncio.create_task(batcher.submit(request("in the queue")))
        return list(await asyncio.gather(first, second, return_exceptions=True))

    first, second = asyncio.run(scenario())
    assert isinstance(first, Unavailable)
    assert isinstance(second, Unavailable)
    assert first.code == second.code == "deadline_exceeded"
    engine.gate.set()
    assert asyncio.run(submit_all(batcher, ["later"])) == ["LATER"]  # the late result harmed nothing
    assert engine.seen == ["on the device", "later"]


def test_cancelled_work_never_reaches_the_device(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=0)
    engine.gate.clear()

    async def scenario() -> None:
        busy = asyncio.create_task(batcher.submit(request("busy")))
        await asyncio.to_thread(engine.entered.acquire)
        leaving = asyncio.create_task(batcher.submit(request("leaving")))
        await asyncio.sleep(0.02)
        leaving.cancel()
        await asyncio.sleep(0.02)
        engine.gate.set()
        await busy
        await batcher.submit(request("next"))

    asyncio.run(scenario())
    assert engine.seen == ["busy", "next"]


@pytest.mark.parametrize("poison", ["boom", "lost", "die"])
def test_one_bad_request_does_not_fail_its_batchmates(engine: Echo, start: Callable[..., Batcher], poison: str) -> None:
    batcher = start(max_wait_ms=500)
    outcomes = asyncio.run(submit_all(batcher, ["a", poison, "b", "c"]))
    assert engine.batches[0] == ["a", poison, "b", "c"]
    assert [outcomes[0], *outcomes[2:]] == ["A", "B", "C"]
    assert isinstance(outcomes[1], CaptuneError)
    assert outcomes[1].code == "engine_failed"
    assert all(len(batch) == 1 for batch in engine.batches[1:])
    assert batcher.ready


def test_a_dead_device_thread_is_restarted_and_reported(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=0)
    (outcome,) = asyncio.run(submit_all(batcher, ["die"]))
    assert isinstance(outcome, CaptuneError)
    assert "thread killed" in outcome.message
    assert asyncio.run(submit_all(batcher, ["alive"])) == ["ALIVE"]
    status = batcher.status()
    assert status["restarts"] == 1
    assert "thread killed" in status["last_death"]
    assert status["state"] == "ready"


def test_errors_of_prepare_and_finish_stay_with_their_request(start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=100)
    good, unreadable, undecodable = asyncio.run(submit_all(batcher, ["good", "unreadable", "undecodable"]))
    assert good == "GOOD"
    assert isinstance(unreadable, InvalidInput)
    assert unreadable.message == "this picture cannot be read"
    assert isinstance(undecodable, CaptuneError)
    assert undecodable.code == "engine_failed"


def test_while_loading_requests_are_told_to_come_back(engine: Echo) -> None:
    engine.gate.clear()
    batcher = Batcher(engine)
    batcher.start()
    (outcome,) = asyncio.run(submit_all(batcher, ["early"]))
    assert isinstance(outcome, Unavailable)
    assert outcome.code == "engine_loading"
    assert outcome.retry_after
    engine.gate.set()
    wait_for(lambda: batcher.ready)
    batcher.stop()


def test_failed_load_is_reported_and_answers_every_request(engine: Echo, start: Callable[..., Batcher]) -> None:
    engine.load_errors = [InvalidInput("no such model; choose another")]
    batcher = start()
    assert (batcher.ready, batcher.state, batcher.error) == (False, "failed", "no such model; choose another")
    (outcome,) = asyncio.run(submit_all(batcher, ["x"]))
    assert isinstance(outcome, Unavailable)
    assert "no such model" in outcome.message


def test_unreachable_model_is_tried_again(
    engine: Echo, start: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "_LOAD_RETRY_S", 0.05)
    engine.load_errors = [Unavailable("the hub cannot be reached")]
    batcher = start()
    wait_for(lambda: batcher.ready)
    assert batcher.error is None
    assert asyncio.run(submit_all(batcher, ["x"])) == ["X"]


def test_stop_answers_everyone_and_leaves_no_thread(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=0)
    engine.gate.clear()

    async def scenario() -> list[Any]:
        running = asyncio.create_task(batcher.submit(request("running")))
        await asyncio.to_thread(engine.entered.acquire)
        queued = [asyncio.create_task(batcher.submit(request(f"q{n}"))) for n in range(20)]
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(asyncio.to_thread(batcher.stop))
        refused = await asyncio.gather(*queued, return_exceptions=True)
        engine.gate.set()
        await stopping
        return [await running, *refused]

    finished, *refused = asyncio.run(scenario())
    assert finished.text == "RUNNING"
    assert {getattr(outcome, "code", None) for outcome in refused} == {"shutting_down"}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("echo-")]
    (late,) = asyncio.run(submit_all(batcher, ["late"]))
    assert isinstance(late, Unavailable)


def test_a_storm_of_good_bad_and_leaving_clients_is_answered_to_the_last(
    engine: Echo, start: Callable[..., Batcher]
) -> None:
    batcher = start(max_wait_ms=1, queue_size=1000, prepare_threads=3)
    draw = random.Random(0)
    kinds = ["boom", "die", "lost", "unreadable", "undecodable"]
    prompts = [draw.choice(kinds) if draw.random() < 0.1 else f"ok{n}" for n in range(300)]

    async def scenario() -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(request(prompt))) for prompt in prompts]
        await asyncio.sleep(0.005)
        for task in tasks[::17]:
            task.cancel()
        async with asyncio.timeout(20):
            return await asyncio.gather(*tasks, return_exceptions=True)

    for number, (prompt, outcome) in enumerate(zip(prompts, asyncio.run(scenario()), strict=True)):
        if isinstance(outcome, Generation):
            assert outcome.text == prompt.upper()
        elif isinstance(outcome, CaptuneError):
            assert prompt in kinds
        else:
            assert isinstance(outcome, asyncio.CancelledError)
            assert number % 17 == 0
    assert batcher.waiting == 0
