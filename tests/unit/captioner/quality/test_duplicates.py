"""Near-duplicates, against the definition computed pair by pair."""

import random
from collections.abc import Sequence

import pytest

from services.captioner.quality import duplicates
from services.captioner.quality.duplicates import THRESHOLD, Duplicates
from services.captioner.quality.words import masked, words

LONG = (
    "A {} with a long soft coat of brown and white hair lies on a green lawn in bright sun, its ears up and its eyes on"
    " the camera, while a red ball rests between the two front paws and a wooden fence runs behind"
)


def found(texts: Sequence[str], names: Sequence[str], page: int = 7) -> tuple[list[bool], list[bool]]:
    captions = Duplicates()
    for start in range(0, len(texts), page):
        captions.add(texts[start : start + page], names[start : start + page])
    captions.add([], [])
    duplicate, across = captions.find()
    return duplicate.tolist(), across.tolist()


def by_definition(texts: Sequence[str], names: Sequence[str]) -> tuple[list[bool], list[bool]]:
    sets = []
    for text, name in zip(texts, names, strict=True):
        run = masked(name, words(text))
        sets.append({tuple(run[i : i + 3]) for i in range(max(1, len(run) - 2))} if run else set())
    across, stands_for, kept = [False] * len(sets), list(range(len(sets))), []
    for i, mine in enumerate(sets):
        near = [j for j in kept if mine and len(mine & sets[j]) >= THRESHOLD * len(mine | sets[j])]
        same = [j for j in near if names[j] == names[i]]
        if same:
            stands_for[i] = min(same)
            continue
        for j in near:
            across[i] = across[j] = True
        kept.append(i)
    return [j != i for i, j in enumerate(stands_for)], [across[j] for j in stands_for]


def test_it_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of few different words, so that every similarity occurs; a step of a few captions, so that all is run."""
    draw = random.Random(0)
    frames = [[draw.choice("red old big wet dry new low hot".split()) for _ in range(40)] for _ in range(6)]  # noqa: SIM905
    texts, names = [], []
    for _ in range(400):
        text = list(draw.choice(frames))
        for _ in range(draw.choice([0, 0, 1, 1, 2, 3, 8])):
            text[draw.randrange(40)] = draw.choice(["red", "old", "big", "blue"])
        texts.append(" ".join(text[: draw.choice([40, 39, 30, 2, 1, 0])]))
        names.append(draw.choice(["cat", "dog", "fox"]))
    expected = by_definition(texts, names)
    assert 40 < sum(expected[0]) < 390
    assert 40 < sum(expected[1]) < 390
    assert found(texts, names) == expected
    assert found(texts, names, page=1000) == expected


def test_the_earliest_of_a_class_stays() -> None:
    text = LONG.format("cat")
    other = text.replace("red ball", "blue ball")
    assert found([text, "A cat.", other, text.upper()], ["cat"] * 4) == ([False, False, True, True], [False] * 4)


def test_what_was_dropped_drops_nothing_else() -> None:
    """a is near b and b near c, but a is not near c: c stays."""
    a = LONG.format("cat")
    b = a.replace("red ball", "blue ball")
    c = b.replace("green lawn", "dry lawn")
    assert found([a, b, c, c], ["cat"] * 4)[0] == [False, True, False, True]


def test_class_names_are_masked_between_classes() -> None:
    texts = [LONG.format("abyssinian").replace("A ", "An ", 1), LONG.format("golden retriever"), "Something else."]
    names = ["abyssinian", "golden retriever", "cat"]
    assert found(texts, names) == ([False] * 3, [True, True, False])
    assert found([*texts, texts[0]], [*names, names[0]])[1] == [True, True, False, True], "and what equals one of them"


def test_one_measurement_apart_is_not_the_same() -> None:
    texts = [
        "A cat in a wide frame, without a clear outline against its surroundings. Lines run in all directions.",
        "A cat in a tall frame, without a clear outline against its surroundings. Lines run in all directions.",
    ]
    assert found(texts, ["cat", "cat"])[0] == [False, False]


def test_short_and_empty_texts() -> None:
    texts = ["", "...", "A cat.", "A cat!", "Two cats.", "A", ""]
    assert found(texts, ["cat"] * 7)[0] == [False, False, False, True, False, False, False]
    assert found([], []) == ([], [])


def test_a_search_can_be_stopped() -> None:
    captions = Duplicates()
    captions.add(["A cat."] * 3, ["cat"] * 3)

    def stop(done: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        captions.find(stop)


def test_candidates_are_missed_seldom_at_the_threshold() -> None:
    assert (1 - THRESHOLD**duplicates.ROWS) ** duplicates.BANDS < 0.002
