"""Answers that come in together are inspected together, and fail alone."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from services.captioner.captioning.inspecting import Inspecting
from services.captioner.quality.inspect import Answer, Inspected, Inspector
from shared.clip.tokens import token_counter


class Picky(Inspector):
    """Fails at one answer; says how many came at once."""

    def __init__(self) -> None:
        super().__init__(token_counter("starter", Path()), ["cat"])
        self.batches: list[int] = []

    def finish_all(self, answers: Sequence[Answer]) -> list[Inspected]:
        self.batches.append(len(answers))
        if any(each.raw == "bad" for each in answers):
            raise RuntimeError("bad")
        return super().finish_all(answers)


def finish(inspector: Inspector, raws: Sequence[str]) -> list[Inspected | BaseException]:
    async def work() -> list[Inspected | BaseException]:
        with closing(Inspecting(inspector)) as inspecting:
            return await asyncio.gather(
                *(inspecting.finish(raw, "cat", "stop") for raw in raws), return_exceptions=True
            )

    return asyncio.run(work())


def test_each_gets_its_own_answer_in_one_batch() -> None:
    inspector = Picky()
    raws = [f"A cat with {number} spots" for number in range(20)]
    assert finish(inspector, raws) == [inspector.finish(raw, "cat") for raw in raws]
    assert inspector.batches[0] == 20


@pytest.mark.parametrize("raws", [["bad"], ["A cat", "bad", "A red cat"]])
def test_only_the_one_that_fails_fails(raws: list[str]) -> None:
    for raw, found in zip(raws, finish(Picky(), raws), strict=True):
        assert isinstance(found, RuntimeError if raw == "bad" else Inspected)
