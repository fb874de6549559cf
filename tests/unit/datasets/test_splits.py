import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datasets.classes import Split
from shared.datasets.splits import Labelled, few_shot
from shared.errors import InvalidInput
from tests.on_lists import assign

SAID: list[Split | None] = [None, None, None, "train", "val", "test"]


@st.composite
def labelled(draw: st.DrawFn, given_splits: bool = True) -> list[Labelled]:
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=5))
    return [
        Labelled(f"class {c}/{i}.jpg", f"class {c}", draw(st.sampled_from(SAID)) if given_splits else None)
        for c, size in enumerate(sizes)
        for i in range(size)
    ]


seeds = st.integers(0, 2**31)
fractions = st.floats(0, 0.5)


@given(labelled(), seeds, fractions, fractions)
def test_partition_that_keeps_what_was_said_and_leaves_something_to_train_on(
    items: list[Labelled], seed: int, val: float, test: float
) -> None:
    drawn = assign(items, seed, val, test)
    assert len(drawn) == len(items)
    assert set(drawn) <= {"train", "val", "test"}
    for item, split in zip(items, drawn, strict=True):
        if item.split in ("val", "test"):
            assert split == item.split
    for held, fraction in (("test", test), ("val", val)):
        if any(item.split == held for item in items) or fraction == 0:
            assert drawn.count(held) == sum(item.split == held for item in items)  # type: ignore[arg-type]
    before = {item.class_name for item in items if item.split in (None, "train")}
    assert {item.class_name for item, split in zip(items, drawn, strict=True) if split == "train"} == before


@given(labelled(), seeds, st.randoms())
def test_same_seed_same_draw_in_any_order(items: list[Labelled], seed: int, shuffler: random.Random) -> None:
    expected = dict(zip((item.path for item in items), assign(items, seed), strict=True))
    shuffler.shuffle(items)
    assert dict(zip((item.path for item in items), assign(items, seed), strict=True)) == expected


@given(labelled(given_splits=False), seeds)
def test_every_class_gives_its_share(items: list[Labelled], seed: int) -> None:
    drawn = Counter(zip((item.class_name for item in items), assign(items, seed), strict=True))
    for name, size in Counter(item.class_name for item in items).items():
        if size >= 3:
            assert drawn[name, "val"] >= 1
        if size >= 2:
            assert abs(drawn[name, "test"] - 0.2 * size) <= max(0.5, 1 - 0.2 * size)
        assert drawn[name, "train"] >= 1


def test_sizes_of_a_plain_draw() -> None:
    items = [Labelled(f"{c}/{i}", c, None) for c in ("a", "b") for i in range(40)]
    assert Counter(assign(items, 0)) == {"train": 56, "test": 16, "val": 8}
    assert assign(items, 0) != assign(items, 1)
    assert assign(items, 0) == assign(items, 0)


def test_only_the_missing_split_is_drawn() -> None:
    items = [Labelled(f"a/{i}", "a", "train") for i in range(10)] + [Labelled("a/t", "a", "test")]
    assert Counter(assign(items, 0)) == {"train": 9, "val": 1, "test": 1}
    assert Counter(assign(items, 0, val_fraction=0)) == {"train": 10, "test": 1}


def test_pictures_with_the_same_bytes_stay_together() -> None:
    items = [Labelled(f"a/{i}", "a", None, sha256=f"hash {i // 2}") for i in range(40)]
    for seed in range(20):
        drawn = assign(items, seed)
        assert all(drawn[i] == drawn[i + 1] for i in range(0, 40, 2))
        assert {"train", "val", "test"} == set(drawn)


def test_the_draw_is_pinned() -> None:
    """A recorded seed must mean the same images in years to come."""
    items = [Labelled(f"a/{i}.jpg", "a", None) for i in range(10)]
    drawn = assign(items, 7)
    held: dict[Split, list[int]] = {side: [i for i, s in enumerate(drawn) if s == side] for side in ("val", "test")}
    assert held == {"val": [1], "test": [0, 2]}
    assert few_shot({"a": [item.path for item in items]}, 3, 7)[0] == ["a/0.jpg", "a/6.jpg", "a/7.jpg"]


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20)), st.integers(1, 25), seeds, st.randoms())
def test_few_shot(sizes: dict[str, int], shots: int, seed: int, shuffler: random.Random) -> None:
    paths = {name: [f"{name}/{i}" for i in range(size)] for name, size in sizes.items()}
    chosen, fewer = few_shot(paths, shots, seed)
    assert Counter(path[0] for path in chosen) == {n: min(shots, size) for n, size in sizes.items() if size}
    assert fewer == {name: size for name, size in sizes.items() if size < shots}
    assert len(set(chosen)) == len(chosen)
    for group in paths.values():
        shuffler.shuffle(group)
    shuffled = dict(reversed(paths.items()))
    assert few_shot(shuffled, shots, seed) == (chosen, fewer)


@given(seeds)
def test_fewer_shots_are_a_subset_of_more(seed: int) -> None:
    paths = {"a": [f"a/{i}" for i in range(30)]}
    chosen = [set(few_shot(paths, shots, seed)[0]) for shots in (1, 2, 4, 8, 16)]
    assert all(smaller < larger for smaller, larger in pairwise(chosen))


def test_no_shots() -> None:
    with pytest.raises(InvalidInput) as caught:
        few_shot({"a": ["a/1"]}, 0, 0)
    assert caught.value.code == "shots_out_of_range"
