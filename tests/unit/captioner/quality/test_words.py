"""Class names in captions."""

import pytest

from services.captioner.quality.words import MASK, Names, masked, mentions, words

CLASSES = [
    "golden retriever",
    "retriever",
    "cat",
    "St. Bernard",
    "fox",
    "puppy",
    "737-200",
    "orange",
    "a",
    "5",
    "cat box",
]


@pytest.mark.parametrize(
    ("own", "text", "named"),
    [
        ("cat", "A fox.", True),
        ("cat", "Two FOXES play.", True),
        ("cat", "Some puppies.", True),
        ("cat", "A St Bernard's barrel.", True),
        ("cat", "A golden-retriever.", True),
        ("cat", "Boeing 737-200", True),
        ("cat", "The catalogue shows a foxglove.", False),
        ("cat", "A cat among cats.", False),
        ("golden retriever", "A retriever; this golden retriever.", False),
        ("golden retriever", "Golden retrievers.", False),
        ("retriever", "A golden retriever.", True),
        ("retriever", "Golden light on a retriever.", False),
        ("cat box", "A cat in a cat box.", False),
        ("cat", "A cat box.", True),
        ("cat", "A bright orange coat with 5 spots, a white one.", False),
        ("unlisted", "An unlisted thing.", False),
        ("cat", "", False),
    ],
)
def test_names_of_other_classes(own: str, text: str, named: bool) -> None:
    assert Names(CLASSES).another(own, words(text)) is named


def test_equal_display_names_and_plurals_of_ones_own_are_no_other_class() -> None:
    names = Names(["crane", "Crane", "glass", "glasses"])
    assert not names.another("crane", words("A crane with cranes."))
    assert not names.another("glass", words("Two glasses."))
    assert names.another("glasses", words("A glass."))


@pytest.mark.parametrize(
    ("own", "text", "found"),
    [
        ("golden retriever", "A Golden Retriever.", True),
        ("golden retriever", "Two retrievers.", True),
        ("golden retriever", "Its coat is golden.", False),
        ("sunflowers", "A sunflower.", True),
        ("puppy", "Puppies!", True),
        ("cat", "A catalogue.", False),
        ("!!!", "Anything.", True),
    ],
)
def test_the_own_label(own: str, text: str, found: bool) -> None:
    assert mentions(own, words(text)) is found


def test_masking_leaves_what_is_not_the_name() -> None:
    expected = ["a", "red", MASK, "with", "a", "ear", "near", MASK]
    assert masked("St. Bernard", words("A red St. Bernard with an ear near bernards")) == expected
    assert masked("cat", words("A red cat with an ear near cats")) == expected
    assert masked("", ["an", "x"]) == ["a", "x"]
