"""The predictor with models that are easy to see through. They add up bytes instead of looking at pictures."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from services.evaluator.prediction.serving import Model, Predictor
from shared.errors import InvalidInput, TooBusy


class Sums:
    """The gate holds the device while closed."""

    def __init__(self, name: str = "a") -> None:
        self.card: Any = SimpleNamespace(name=name)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.batches: list[list[int]] = []

    def prepare(self, image: bytes) -> int:
        if image == b"bad":
            raise InvalidInput("it is no picture", code="unsupported_format")
        return sum(image)

    def probabilities(self, prepared: Sequence[int]) -> list[list[float]]:
        self.batches.append(list(prepared))
        self.entered.release()
        self.gate.wait(10)
        if 13 in prepared:
            raise RuntimeError("device error")
        rows = [[float(value)] for value in prepared]
        return rows[:-1] if 17 in prepared else rows


def predictor(**changes: int) -> Predictor:
    return Predictor(**{"models": 2, "queue": 100, "batch": 4, "body_bytes": 1000} | changes)


def ask(served: Predictor, model: Model, *images: int, key: str = "a") -> Any:
    names = [f"{value}.png" for value in images]
    return served.predict(key, lambda: model, names, [bytes([value]) for value in images])


def rows(*values: int) -> list[list[float]]:
    return [[float(value)] for value in values]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def test_every_image_gets_its_own_answer():
    model = Sums()
    card, found = asyncio.run(ask(predictor(), model, 3, 1, 2))
    assert card is model.card
    assert found == rows(3, 1, 2)


def test_waiting_requests_share_batches_up_to_the_size():
    async def run() -> None:
        served, model = predictor(batch=4), Sums()
        model.gate.clear()
        first = asyncio.create_task(ask(served, model, 1))
        await until(lambda: model.batches)
        others = [asyncio.create_task(ask(served, model, *images)) for images in ((2, 3), (4, 5), (6,), (7,))]
        await until(lambda: len(served._waiting) == 4)
        model.gate.set()
        assert (await first)[1] == rows(1)
        assert [found for _, found in await asyncio.gather(*others)] == [rows(2, 3), rows(4, 5), rows(6), rows(7)]
        assert [len(batch) for batch in model.batches] == [1, 4, 2]

    asyncio.run(run())


def test_a_request_larger_than_a_batch_goes_through():
    model = Sums()
    assert asyncio.run(ask(predictor(batch=2), model, 1, 2, 3, 4, 5))[1] == rows(1, 2, 3, 4, 5)
    assert model.batches == [[1, 2, 3, 4, 5]]  # the model splits it


def test_models_do_not_mix():
    async def run() -> None:
        served, a, b = predictor(batch=10), Sums("a"), Sums("b")
        a.gate.clear()
        tasks = [asyncio.create_task(ask(served, a, 1))]
        await until(lambda: a.batches)
        tasks += [
            asyncio.create_task(ask(served, *each, key=key)) for *each, key in ((a, 2, "a"), (b, 3, "b"), (a, 4, "a"))
        ]
        await until(lambda: len(served._waiting) == 3)
        a.gate.set()
        assert [found for _, found in await asyncio.gather(*tasks)] == [rows(1), rows(2), rows(3), rows(4)]
        assert (a.batches, b.batches) == ([[1], [2, 4]], [[3]])

    asyncio.run(run())


def test_beyond_the_queue_it_is_busy_and_afterwards_not():
    async def run() -> None:
        served, model = predictor(queue=4), Sums()
        model.gate.clear()
        waiting = [asyncio.create_task(ask(served, model, i, i)) for i in (1, 2)]
        await until(lambda: model.batches)
        with pytest.raises(TooBusy) as caught:
            await ask(served, model, 3)
        assert (caught.value.status, caught.value.retry_after) == (429, 1)
        model.gate.set()
        await asyncio.gather(*waiting)
        assert (await ask(served, model, 3))[1] == rows(3)
        assert (await ask(served, model, *range(6)))[1] == rows(*range(6))  # alone it is never too large

    asyncio.run(run())


@pytest.mark.parametrize("image", [13, 17])
def test_a_batch_that_fails_or_loses_rows_is_answered_and_the_next_one_works(image):
    async def run() -> None:
        served, model = predictor(), Sums()
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await ask(served, model, image)
        assert (await ask(served, model, 1))[1] == rows(1)
        assert served._admitted == 0

    asyncio.run(run())


def test_a_bad_image_is_named():
    async def run() -> None:
        served = predictor()
        with pytest.raises(InvalidInput, match=r"the image 'x.png': it is no picture") as caught:
            await served.predict("a", Sums, ["ok.png", "x.png"], [b"1", b"bad"])
        assert (caught.value.code, caught.value.param) == ("unsupported_format", "images")
        assert served._admitted == 0

    asyncio.run(run())


def test_a_model_is_loaded_once_and_the_least_recently_used_goes():
    async def run() -> None:
        served, loads = predictor(models=2), []

        def load(name: str) -> Callable[[], Model]:
            def make() -> Model:
                loads.append(name)
                return Sums(name)

            return make

        async def use(name: str) -> None:
            card, _ = await served.predict(name, load(name), ["1"], [b"1"])
            assert card.name == name

        await asyncio.gather(*(use("a") for _ in range(5)))
        assert loads == ["a"]
        for name in ("b", "a", "c", "a", "b"):  # c pushes b out
            await use(name)
        assert loads == ["a", "b", "c", "b"]

    asyncio.run(run())


def test_a_load_that_fails_is_tried_again():
    async def run() -> None:
        served, attempts = predictor(), []

        def load() -> Model:
            attempts.append(1)
            if len(attempts) == 1:
                raise InvalidInput("the file is missing")
            return Sums()

        with pytest.raises(InvalidInput, match="missing"):
            await served.predict("a", load, ["1"], [b"1"])
        assert (await served.predict("a", load, ["1"], [b"1"]))[1] == [[49.0]]

    asyncio.run(run())


def test_a_caller_that_leaves_takes_nobody_along():
    async def run() -> None:
        served, model = predictor(), Sums()
        model.gate.clear()
        first = asyncio.create_task(ask(served, model, 1))
        await until(lambda: model.batches)
        leaving, staying = (asyncio.create_task(ask(served, model, value)) for value in (2, 3))
        await until(lambda: len(served._waiting) == 2)
        leaving.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        assert [(await task)[1] for task in (first, staying)] == [rows(1), rows(3)]
        assert model.batches == [[1], [3]]
        assert served._admitted == 0

    asyncio.run(run())


def test_bodies_are_read_while_there_is_room():
    served = predictor(body_bytes=10)
    with served.holding(50):  # alone it is never too large
        with pytest.raises(TooBusy) as caught, served.holding(1):
            pass
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
    with served.holding(4), served.holding(6), pytest.raises(TooBusy), served.holding(1):
        pass
    with served.holding(10):
        assert served._held == 10
    assert served._held == 0
