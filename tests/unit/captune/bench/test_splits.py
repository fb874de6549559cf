"""Splits that a release lacks: stratified, seeded, and never mixing what belongs together."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captune.bench.data import Entry, LayoutError, Reading, check
from captune.bench.readers.gtsrb import track
from captune.bench.splits import cut, hold_out, three_ways

labels = st.sampled_from(["cat", "dog", "owl"])
counts = st.dictionaries(labels, st.integers(1, 40), min_size=1)


def reading(images: dict[str, int], tests: int = 0) -> Reading:
    entries = [Entry(f"{label}/{n}.jpg", label, "train") for label, count in images.items() for n in range(count)]
    entries += [Entry(f"test/{label}/{n}.jpg", label, "test") for label in images for n in range(tests)]
    return Reading(Path("."), entries)


def where(found: Reading) -> dict[str, str]:
    return {entry.path: entry.split for entry in found.entries}


@given(counts, st.integers(0, 5), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_val_is_stratified_and_out_of_train_only(images: dict[str, int], seed: int, tests: int, share: float) -> None:
    found = reading(images, tests)
    before = where(found)
    hold_out(found, seed, share=share)
    assert {path for path, split in where(found).items() if split == "test"} == {
        path for path, split in before.items() if split == "test"
    }
    assert [entry.path for entry in found.entries] == list(before)
    for label, count in images.items():
        val = found.counts()["val"].get(label, 0)
        assert val == (0 if count == 1 else min(count - 1, max(1, round(share * count))))
        assert found.counts()["train"][label] == count - val


@given(counts, st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_draw_depends_on_seed_and_names_alone(images: dict[str, int], seed: int, order: random.Random) -> None:
    one, other = reading(images), reading(images)
    order.shuffle(other.entries)
    hold_out(one, seed)
    hold_out(other, seed)
    assert where(one) == where(other)


def test_another_seed_draws_others() -> None:
    one, other = reading({"cat": 40}), reading({"cat": 40})
    hold_out(one, 0)
    hold_out(other, 1)
    assert where(one) != where(other)
    assert "seed 1" in other.notes[0]


tracks = st.dictionaries(
    st.tuples(labels, st.integers(0, 20)), st.integers(1, 8), min_size=1, max_size=25
)  # (class, track) -> frames


@settings(max_examples=200)
@given(tracks, st.integers(0, 5))
def test_gtsrb_tracks_are_never_mixed(found: dict[tuple[str, int], int], seed: int) -> None:
    entries = [
        Entry(f"Final_Training/Images/{label}/{number:05d}_{frame:05d}.ppm", label, "train")
        for (label, number), frames in found.items()
        for frame in range(frames)
    ]
    result = Reading(Path("."), entries)
    hold_out(result, seed, unit=track)
    sides: dict[tuple[str, str], set[str]] = {}
    for entry in result.entries:
        sides.setdefault((entry.label, track(entry)), set()).add(entry.split)
    assert all(len(splits) == 1 for splits in sides.values())
    for label in {label for label, _ in found}:
        mine = [splits for (of, _), splits in sides.items() if of == label]
        assert {"train"} in mine
        assert ({"val"} in mine) == (len(mine) > 1)


@given(counts, st.integers(0, 5))
def test_three_ways_leaves_each_class_something_to_train_on(images: dict[str, int], seed: int) -> None:
    found = reading(images)
    three_ways(found, seed)
    for label, count in images.items():
        parts = {split: found.counts()[split].get(label, 0) for split in ("train", "val", "test")}
        assert sum(parts.values()) == count
        assert parts["train"] >= 1
        assert (parts["test"] >= 1) == (count > 1)
        assert (parts["val"] >= 1) == (count > 2)
    assert not found.official


def test_shares_of_three_ways() -> None:
    found = reading({"cat": 100, "dog": 10})
    three_ways(found, 0)
    assert found.counts() == {
        "train": {"cat": 50, "dog": 5},
        "val": {"cat": 20, "dog": 2},
        "test": {"cat": 30, "dog": 3},
    }


def test_a_pool_cuts_train_alone() -> None:
    found = reading({"cat": 40, "dog": 5}, tests=3)
    hold_out(found, 0)
    val = {path for path, split in where(found).items() if split == "val"}
    cut(found, 8, 0)
    assert found.counts()["train"] == {"cat": 8, "dog": 4}
    assert {path for path, split in where(found).items() if split == "val"} == val
    assert found.counts()["test"] == {"cat": 3, "dog": 3}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "cat", "train"), ("b", "cat", "val"), ("c", "cat", "test")], "1 classes"),
        ([("a", "cat", "train"), ("b", "dog", "train"), ("c", "dog", "test")], "no image of the val split"),
        ([("a", "cat", "train"), ("b", "cat", "val"), ("c", "dog", "test")], "without a train image: dog"),
        ([("a", "Sea_Lake", "train"), ("b", "sea-lake", "train"), ("c", "Sea_Lake", "val"), ("d", "Sea_Lake", "test")],
         "'Sea_Lake' and 'sea-lake' would be called alike"),
    ],
)  # fmt: skip
def test_what_the_server_would_refuse_is_refused_before_the_upload(entries: list[tuple], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check(Reading(Path("."), [Entry(*each) for each in entries]), "Data")
