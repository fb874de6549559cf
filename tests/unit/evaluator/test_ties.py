"""Which rows are marked as not distinguishable from the best."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from services.evaluator.board.correctness import Bits, Run, matrix, pair
from services.evaluator.board.ties import Contender, Ties, p_value

RIGHT = np.random.default_rng(0).random((8, 500)) < 0.7


def bits(rows: Any) -> dict[str, Bits]:
    return {str(i): Bits(len(row), np.packbits(row).tobytes()) for i, row in enumerate(rows)}


def contender(
    values: Sequence[float], *, first: int = 0, seeds: Sequence[int] | None = None, untrained: bool = False
) -> Contender:
    numbers = seeds or range(len(values))
    pairs = enumerate(zip(numbers, values, strict=True), first)
    return Contender(tuple(Run((seed, seed), value, str(i)) for i, (seed, value) in pairs), untrained)


def test_accuracies_are_compared_image_by_image() -> None:
    """Means that a t-test over three seeds would not tell apart; but the better one is right wherever the other is."""
    worse = RIGHT[:3].copy()
    worse[:, :25] = False
    found = bits([*RIGHT[:3], *worse])
    a, b = contender(RIGHT[:3].mean(1).tolist()), contender(worse.mean(1).tolist(), first=3)
    assert (p := p_value("top1", a, b, found)) is not None
    assert p < 0.01
    assert (p := p_value("top1", a, contender(RIGHT[:3].mean(1).tolist()), found)) == 1.0


def test_without_predictions_the_seeds_decide() -> None:
    a, b = contender([0.70, 0.71, 0.72]), contender([0.60, 0.61, 0.62])
    assert p_value("top1", a, b, {}) == 0.0  # the same difference at every seed
    apart = contender([0.60, 0.61, 0.62], seeds=[7, 8, 9])
    assert 0 < (p_value("top1", a, apart, {}) or 0) < 0.01


def test_one_seed_tells_nothing_of_a_method_that_trains() -> None:
    many, one = contender([0.7, 0.71, 0.72]), contender([0.5])
    fixed = contender([0.5], untrained=True)
    assert p_value("nll", many, one, {}) is None
    assert p_value("top1", many, one, bits(RIGHT)) is None
    assert (p := p_value("nll", many, fixed, {})) is not None
    assert p < 0.01
    assert p_value("nll", fixed, fixed, {}) is None
    other = contender([0.7], first=1, untrained=True)
    assert (p := p_value("top1", fixed, other, bits(RIGHT))) is not None  # by the images alone
    assert p > 0.05


def test_a_pair_is_computed_once() -> None:
    ties = Ties()
    a, b = contender([0.70, 0.71, 0.72]), contender([0.60, 0.61, 0.62])
    assert not ties.known("nll", a, b)
    assert ties.tied("nll", a, b, {}) is False
    assert ties.known("nll", a, b)
    assert not ties.known("top1", a, b)
    small = Ties(pairs=1)
    small.tied("nll", a, b, {})
    small.tied("nll", b, a, {})
    assert not small.known("nll", a, b)


def test_runs_with_the_same_seeds_are_one() -> None:
    found = matrix([Run((0, 0), 0, "0"), Run((1, 0), 0, "1"), Run((0, 0), 0, "2")], bits(RIGHT))
    assert found is not None
    seeds, rows = found
    assert seeds == [(0, 0), (1, 0)]
    assert np.array_equal(rows, [(RIGHT[0] * 1.0 + RIGHT[2]) / 2, RIGHT[1]])


def test_other_images_make_no_matrix() -> None:
    other = bits(RIGHT) | {"1": Bits(499, np.packbits(RIGHT[1][:499]).tobytes())}
    assert matrix([Run((0, 0), 0, "0"), Run((1, 0), 0, "1")], other) is None
    assert matrix([Run((0, 0), 0, None)], other) is None


@pytest.mark.parametrize(("least", "how", "pairs"), [(1, "seeds", 1), (2, "runs", 6)])
def test_pairs_are_of_the_same_seeds_where_there_are_enough(least: int, how: str, pairs: int) -> None:
    a = ([(0, 0), (1, 1), (2, 2)], RIGHT[:3] * 1.0)
    b = ([(2, 2), (3, 3)], RIGHT[3:5] * 1.0)
    found = pair(a, b, False, False, least)
    assert (found.how, found.pairs) == (how, pairs)
    if how == "seeds":
        assert np.array_equal(found.a[0], a[1][2])
        assert np.array_equal(found.b[0], b[1][0])
