"""Who may ask next."""

import asyncio
from contextlib import suppress

import pytest

from services.captioner.captioning import slots
from services.captioner.captioning.slots import Slots


def test_no_more_than_the_limit_in_order() -> None:
    async def work() -> list[int]:
        free, inside, most, order = Slots(2), 0, 0, []

        async def one(number: int) -> None:
            nonlocal inside, most
            async with free:
                inside += 1
                most = max(most, inside)
                order.append(number)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*map(one, range(20)))
        assert (inside, most) == (0, 2)
        return order

    assert asyncio.run(work()) == list(range(20))


def test_refusals_at_the_same_time_halve_the_limit_once_and_answers_bring_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        free = Slots(8)
        for _ in range(5):
            free.narrow()
        assert free.limit == 4
        monkeypatch.setattr(slots, "NARROW_SECONDS", 0.0)
        for _ in range(5):
            free.narrow()
        assert free.limit == 1, "never none"
        for _ in range(1000):
            free.widen()
        assert free.limit == 8

    asyncio.run(work())


def test_a_slot_given_to_a_task_that_was_cancelled_is_passed_on() -> None:
    async def work() -> None:
        free = Slots(1)
        await free.__aenter__()

        async def hold() -> None:
            async with free:
                pass

        first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0)
        await free.__aexit__()  # gives the slot to the first, which has not run yet
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        await asyncio.wait_for(second, 1)
        await asyncio.wait_for(hold(), 1)

    asyncio.run(work())
