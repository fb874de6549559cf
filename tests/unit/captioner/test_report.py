"""The figures of a caption report that are computed outside the database."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.routes.report import distinct, histogram


def test_bins_end_at_the_budget_and_go_on_beyond_it() -> None:
    bins = [(b.low, b.high, b.captions) for b in histogram({1: 1, 10: 2, 71: 3, 77: 4, 78: 5, 87: 6, 120: 7, 0: 8}, 77)]
    assert bins == [
        (0, 0, 8),
        (1, 10, 3),
        *((low, low + 9, 0) for low in range(11, 71, 10)),
        (71, 77, 7),
        (78, 87, 11),
        (118, 127, 7),
    ]


@given(st.dictionaries(st.integers(0, 5000), st.integers(1, 100)), st.integers(8, 512))
def test_every_caption_is_in_one_bin(lengths: dict[int, int], budget: int) -> None:
    bins = histogram(lengths, budget)
    assert sum(b.captions for b in bins) == sum(lengths.values())
    for one, following in pairwise(bins):
        assert one.high < following.low
    for b in bins:
        assert b.captions == sum(n for length, n in lengths.items() if b.low <= length <= b.high)
        assert (b.low <= budget) == (b.high <= budget)
    assert {low for low in range(1, budget + 1, 10)} <= {b.low for b in bins}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], (0.0, 0.0)),
        (["", "..."], (0.0, 0.0)),
        (["grey"], (1.0, 0.0)),
        (["a grey cat"], (1.0, 1.0)),
        (["A grey cat.", "a grey, cat"], (0.5, 0.5)),
        (["a cat a cat"], (0.5, 0.6667)),
        (["grey cat", "dog grey"], (0.75, 1.0)),  # no pair across texts
        (["it's its"], (1.0, 1.0)),
    ],
)
def test_distinct_words_and_pairs(texts: list[str], expected: tuple[float, float]) -> None:
    assert distinct(texts) == expected
