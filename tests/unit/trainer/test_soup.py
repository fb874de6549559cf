"""The greedy soup's recipe, on numbers one can follow."""

from collections.abc import Callable

import pytest
import torch

from services.trainer.runs.soup import Ingredient, State, greedy
from shared.classifier.head import Head


def ingredient(id: str, value: float) -> Ingredient:
    state = {"weight": torch.full((2, 3), value), "batches": torch.tensor(int(10 * value))}
    return Ingredient(id, state, Head(torch.full((2, 3), 2 * value), torch.full((2,), -value)))


def nearest_to(target: float) -> Callable[[State, Head], float]:
    return lambda state, head: 1 - abs(float(state["weight"].mean()) - target)


def nothing(_: int) -> None:
    return None


def test_what_lowers_the_score_is_left_out_and_equals_are_kept() -> None:
    """Best first: 1.0; with 0.0 the mean is 0.5, nearer to 0.6; with 5.0 far off; with 0.7 again nearer."""
    candidates = [ingredient("a", 1.0), ingredient("b", 0.0), ingredient("c", 5.0), ingredient("d", 0.7)]
    state, head, members, tried = greedy(candidates, nearest_to(0.6), nothing)
    assert members == ["a", "b", "d"]
    assert tried == pytest.approx([0.6, 0.9, -0.4, 1 - (0.6 - 1.7 / 3)], abs=1e-6)
    torch.testing.assert_close(state["weight"], torch.full((2, 3), 1.7 / 3))
    torch.testing.assert_close(head.weight, torch.full((2, 3), 3.4 / 3))
    torch.testing.assert_close(head.bias, torch.full((2,), -1.7 / 3))
    assert state["batches"] == 10, "counts are not averaged"
    _, _, members, _ = greedy(candidates, lambda *_: 0.5, nothing)
    assert members == ["a", "b", "c", "d"], "no worse is good enough"


def test_the_best_alone_where_nothing_helps() -> None:
    candidates = [ingredient("a", 1.0), ingredient("b", 0.0)]
    state, _, members, tried = greedy(candidates, nearest_to(1.0), nothing)
    assert members == ["a"]
    assert len(tried) == 2
    assert torch.equal(state["weight"], candidates[0].state["weight"])


def test_candidates_are_left_as_they_are() -> None:
    seen: list[str] = []

    made = [ingredient(id, 1.0 + i) for i, id in enumerate("abc")]
    before = [each.state["weight"].clone() for each in made]
    greedy(iter(made), lambda *_: 1.0, lambda done: seen.append(f"{done}"))
    assert seen == ["0", "1", "2"]
    assert all(torch.equal(each.state["weight"], kept) for each, kept in zip(made, before, strict=True))


def test_whoever_looks_on_may_stop_it() -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 1:
            raise Stop

    with pytest.raises(Stop):
        greedy([ingredient("a", 1.0), ingredient("b", 2.0)], lambda *_: 1.0, stop)
