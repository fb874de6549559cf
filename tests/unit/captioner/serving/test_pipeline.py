"""Lanes, turns and streamed text; and a storm in which every request is answered exactly once."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.serving.batcher import Batcher
from shared.errors import CaptuneError
from tests.unit.captioner.serving.echo import Echo, request, serving, submit_all, wait_for


@pytest.fixture
def engine() -> Echo:
    return Echo()


@pytest.fixture
def start(engine: Echo) -> Iterator[Callable[..., Batcher]]:
    with serving(engine) as make:
        yield make


def test_what_came_while_the_device_was_busy_goes_at_once_and_in_turns(
    engine: Echo, start: Callable[..., Batcher]
) -> None:
    """Twenty long requests wait when two short ones come: those wait for one batch, not for all."""
    batcher = start(max_wait_ms=10_000)

    def ask(prompt: str, max_tokens: int) -> "asyncio.Task[Generation]":
        return asyncio.create_task(batcher.submit(CaptionRequest((), prompt, max_tokens=max_tokens)))

    async def scenario() -> None:
        tasks = [ask(f"long {n}", 200) for n in range(4)]
        await asyncio.to_thread(engine.entered.acquire)
        tasks += [ask(f"long {n}", 200) for n in range(4, 24)]
        await asyncio.to_thread(wait_for, lambda: len(batcher._pipeline._prepared) == 8)
        tasks += [ask(f"short {n}", 20) for n in range(2)]
        await asyncio.to_thread(wait_for, lambda: len(batcher._pipeline._prepared) == 10)  # while the device is busy
        engine.gate.set()
        async with asyncio.timeout(5):  # nothing waits 10 s for company: the short ones were there before
            await asyncio.gather(*tasks)

    engine.gate.clear()
    asyncio.run(scenario())
    kinds = [{prompt.split()[0] for prompt in batch} for batch in engine.batches]
    assert kinds[:3] == [{"long"}, {"short"}, {"long"}]
    assert [len(batch) for batch in engine.batches] == [4, 2, 4, 4, 4, 4, 4]
    assert sorted(engine.seen) == sorted([*(f"long {n}" for n in range(24)), "short 0", "short 1"])


def test_a_shelf_full_of_requests_whose_clients_left_makes_room(engine: Echo, start: Callable[..., Batcher]) -> None:
    batcher = start(max_wait_ms=0)
    engine.gate.clear()

    async def scenario() -> None:
        busy = asyncio.create_task(batcher.submit(request("boom")))  # fails: no finish wakes the CPU threads
        await asyncio.to_thread(engine.entered.acquire)
        leaving = [asyncio.create_task(batcher.submit(request(f"leaving {n}"))) for n in range(8)]
        await asyncio.to_thread(wait_for, lambda: len(batcher._pipeline._prepared) == 8)
        staying = asyncio.create_task(batcher.submit(request("staying 0")))
        await asyncio.sleep(0.02)
        for task in leaving:
            task.cancel()
        await asyncio.sleep(0.02)
        engine.gate.set()
        async with asyncio.timeout(5):
            with pytest.raises(CaptuneError):
                await busy
            assert (await staying).text == "STAYING 0"

    asyncio.run(scenario())
    assert engine.seen == ["boom", "staying 0"]


def test_lanes_generate_side_by_side_and_the_engine_loads_once(engine: Echo, start: Callable[..., Batcher]) -> None:
    engine.max_batch = 1
    batcher = start(lanes=5)
    engine.gate.clear()

    async def scenario() -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(request(f"p{n}"))) for n in range(7)]
        for _ in range(5):
            await asyncio.to_thread(engine.entered.acquire)
        await asyncio.sleep(0.05)
        assert len(engine.batches) == 5  # no more than there are lanes
        assert batcher.waiting == 2
        engine.gate.set()
        return await asyncio.gather(*tasks)

    assert [generation.text for generation in asyncio.run(scenario())] == [f"P{n}" for n in range(7)]
    assert engine.loads == 1


def test_lanes_that_die_answer_their_requests_and_start_over(engine: Echo, start: Callable[..., Batcher]) -> None:
    engine.max_batch = 2
    batcher = start(lanes=3, max_wait_ms=0)
    outcomes = asyncio.run(submit_all(batcher, [*["die"] * 9, "a", "b"]))
    assert outcomes[9:] == ["A", "B"]
    assert all(isinstance(outcome, CaptuneError) and outcome.code == "engine_failed" for outcome in outcomes[:9])
    assert batcher.status()["restarts"] >= 9
    before = len([thread for thread in threading.enumerate() if thread.name.startswith("echo-lane")])
    assert before == 3
    assert asyncio.run(submit_all(batcher, ["c"])) == ["C"]
    assert engine.loads == 1


def test_text_comes_while_it_is_written_but_never_twice(engine: Echo, start: Callable[..., Batcher]) -> None:
    """A request whose text is partly out is not tried again after its batch failed."""
    batcher = start(max_wait_ms=500)
    heard: list[str] = []

    async def scenario() -> list[Any]:
        spoken = CaptionRequest((), "spoken", on_text=heard.append)
        calls = [spoken, request("boom"), request("silent"), request("x")]
        return await asyncio.gather(*(batcher.submit(call) for call in calls), return_exceptions=True)

    spoken, _, silent, _ = asyncio.run(scenario())
    assert heard == ["SPO"]
    assert isinstance(spoken, CaptuneError)
    assert silent.text == "SILENT"


@pytest.mark.parametrize("lanes", [1, 8])
def test_a_storm_is_answered_to_the_last(engine: Echo, start: Callable[..., Batcher], lanes: int) -> None:
    """500 requests of 64 clients, some of which leave, against an engine that fails and dies at random."""
    draw = random.Random(lanes)
    bad = ["boom", "die", "lost", "unreadable", "undecodable", "unsortable"]
    batcher = start(lanes=lanes, max_wait_ms=1, queue_size=100, prepare_threads=3)
    threads = threading.active_count()
    left = [f"{draw.choice(['long', 'short'])} {n}" if draw.random() > 0.12 else draw.choice(bad) for n in range(500)]
    answers: list[tuple[str, Any]] = []

    async def client(number: int) -> None:
        while left:
            prompt = left.pop()
            task = asyncio.create_task(batcher.submit(request(prompt)))
            if number % 7 == 0:
                await asyncio.sleep(draw.random() / 200)
                task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            answers.append((prompt, outcome))

    async def scenario() -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*(client(number) for number in range(64)))

    asyncio.run(scenario())
    assert len(answers) == 500
    for prompt, outcome in answers:
        if isinstance(outcome, Generation):
            assert outcome.text == prompt.upper()
        elif isinstance(outcome, CaptuneError):
            assert prompt in bad
        else:
            assert isinstance(outcome, asyncio.CancelledError)
    assert sum(isinstance(outcome, asyncio.CancelledError) for _, outcome in answers) > 10
    assert batcher.status()["restarts"] > 3
    wait_for(lambda: batcher.waiting == 0)
    wait_for(lambda: not batcher._pipeline._in_flight and not batcher._pipeline._raw)
    assert threading.active_count() <= threads
    assert batcher.ready
    assert asyncio.run(submit_all(batcher, ["after"])) == ["AFTER"]
    batcher.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("echo-")]
