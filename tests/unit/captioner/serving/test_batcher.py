"""The batcher's promise: every admitted request is answered, and no request pays for another's fault."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.serving import batcher as batcher_module
from services.captioner.serving.batcher import Batcher
from services.captioner.serving.buckets import Item
from shared.errors import CaptuneError, InvalidInput, TooBusy, Unavailable
from tests.unit.captioner.serving.echo import Echo, request, serving, submit_all, wait_for


@pytest.fixture
def engine() -> Echo:
    return Echo()


@pytest.fixture
def start(engine: Echo) -> Iterator[Callable[..., Batcher]]:
    with serving(engine) as make:
        yield make


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


def test_the_largest_batch_may_be_chosen_while_loading() -> None:
    """As by an engine that finds a GPU."""

    class Larger(Echo):
        def load(self) -> None:
            super().load()
            self.max_batch = 9

    engine = Larger(max_batch=2)
    with serving(engine) as start:
        asyncio.run(submit_all(start(max_wait_ms=500), [str(n) for n in range(9)]))
    assert [len(batch) for batch in engine.batches] == [9]


def test_what_would_be_refused_is_refused_before_its_pictures_are_unpacked(
    engine: Echo, start: Callable[..., Batcher]
) -> None:
    batcher = start(queue_size=2)
    with batcher.unpacking(), batcher.unpacking(), pytest.raises(TooBusy), batcher.unpacking():
        pytest.fail("a third is unpacked for two places")
    with batcher.unpacking():
        pass  # a place is free again
    batcher.stop()
    with pytest.raises(Unavailable), batcher.unpacking():
        pytest.fail("unpacked for nobody")


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
    with pytest.raises(Unavailable, match="shutting down"):  # had it been let in a moment before the stop
        batcher._pipeline.put(Item(request("late"), deadline=float("inf")), 10)


def test_a_request_that_cannot_be_sorted_fails_alone(start: Callable[..., Batcher]) -> None:
    good, unsortable = asyncio.run(submit_all(start(), ["good", "unsortable"]))
    assert good == "GOOD"
    assert isinstance(unsortable, CaptuneError)


class Warm(Echo):
    warms_up = True


def test_warm_up_measures_before_the_first_request() -> None:
    engine = Warm()
    batcher = Batcher(engine)
    assert batcher.rate() is None
    batcher.start()
    wait_for(lambda: batcher.ready)
    rate = batcher.rate()
    assert rate is not None
    assert rate.captions_per_second > 0
    assert (rate.prompt_tokens_per_caption, rate.completion_tokens_per_caption) == (5, 2)
    assert batcher.status()["rate"]["captions_per_second"] == round(rate.captions_per_second, 3)
    assert [len(batch) for batch in engine.batches] == [1, 1, 4]
    batcher.stop()


def test_a_model_that_cannot_write_its_first_caption_does_not_become_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Warm()
    monkeypatch.setattr(engine, "generate", lambda prepared: [])
    batcher = Batcher(engine)
    batcher.start()
    wait_for(lambda: batcher.state == "failed")
    assert batcher.error is not None
    assert "made-up caption failed: RuntimeError: the engine returned 0 outputs for 1 requests" in batcher.error
    (outcome,) = asyncio.run(submit_all(batcher, ["x"]))
    assert isinstance(outcome, Unavailable)
    assert "made-up caption" in outcome.message
    batcher.stop()


def test_warm_up_that_finds_a_server_down_is_tried_again_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "_LOAD_RETRY_S", 0.05)
    engine = Warm()
    write = engine.generate
    answers = iter([Unavailable("the server is down")])

    def generate(prepared: Sequence[CaptionRequest]) -> list[str]:
        for error in answers:
            raise error
        return write(prepared)

    monkeypatch.setattr(engine, "generate", generate)
    batcher = Batcher(engine)
    batcher.start()
    wait_for(lambda: batcher.ready)
    assert (engine.loads, batcher.error) == (1, None)
    batcher.stop()


def test_metrics_count_what_happened(engine: Echo, start: Callable[..., Batcher]) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"captune_captioner_{name}", {"engine": "echo", **labels}) or 0.0

    names = ["captions_total", "prompt_tokens_total", "image_tokens_total", "completion_tokens_total", "seconds_count"]
    before = {name: value(name) for name in [*names, "batch_size_count"]}
    failed, retried = value("failures_total", code="engine_failed"), value("retries_total", reason="batch_failed")
    batcher = start(max_wait_ms=500)
    asyncio.run(submit_all(batcher, ["a", "boom", "b", "c"]))
    gained = {name: value(name) - before[name] for name in before}
    assert gained == {
        "captions_total": 3,
        "prompt_tokens_total": 15,
        "image_tokens_total": 9,
        "completion_tokens_total": 6,
        "seconds_count": 3,
        "batch_size_count": 5,
    }
    assert value("failures_total", code="engine_failed") - failed == 1
    assert value("retries_total", reason="batch_failed") - retried == 4

    async def depth() -> float:
        engine.gate.clear()
        tasks = [asyncio.create_task(batcher.submit(request("x"))) for _ in range(7)]
        await asyncio.to_thread(engine.entered.acquire)
        await asyncio.to_thread(wait_for, lambda: batcher.waiting == 3)
        seen = value("queue_depth")
        engine.gate.set()
        await asyncio.gather(*tasks)
        return seen

    for _ in range(5):
        engine.entered.acquire()
    assert asyncio.run(depth()) == 3
    assert value("queue_depth") == 0


def test_device_memory_is_looked_up_when_the_metrics_are_read(
    engine: Echo, start: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "device_memory", lambda: (len(engine.batches), 100))
    batcher = start()
    asyncio.run(submit_all(batcher, ["a"]))

    def memory(state: str) -> float | None:
        labels = {"engine": "echo", "state": state}
        return REGISTRY.get_sample_value("captune_captioner_device_memory_bytes", labels)

    assert (memory("used"), memory("total")) == (1, 100)
    batcher.stop()
    assert memory("used") is None
    assert REGISTRY.get_sample_value("captune_captioner_queue_depth", {"engine": "echo"}) is None
