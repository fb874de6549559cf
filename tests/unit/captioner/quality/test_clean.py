"""What stays of a model's answer."""

import re
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.captioner.quality.clean import clean, storable

MARKS = [
    *"*_`~#-|>\"'.,:!() \n\t1[]<",
    "**",
    "__",
    "```",
    "~~~",
    "- ",
    "2) ",
    "# ",
    "|---|",
    "\n\n",
    "\u201c",
    "\u201d",
]
TALK = [
    "Sure! ",
    "Caption: ",
    "The image shows ",
    "In this photo, ",
    "A picture of a ",
    "Here is a caption: ",
    "We can see ",
]
LETTERS = ["The primary visual features of the cat are: ", "a dog", "cat", "<br>", "\u00df", "\u0149", "\x00", "\x07"]
PIECES = st.sampled_from([*MARKS, *TALK, *LETTERS])
answers = st.text() | st.lists(PIECES, max_size=25).map("".join)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("A **golden** retriever with a *long* `coat`", "A golden retriever with a long coat."),
        ("**Coat:** short\n**Eyes:** green", "Coat: short. Eyes: green."),
        ("the _very_ long snake_case __stays__", "The very long snake_case stays."),
        ("a ___ cat _sits", "A ___ cat sits."),
        ("# Visual traits\n- long coat\n\u2022 floppy ears\n\n1. Brown nose\n2) wet eyes",
         "Visual traits. Long coat. Floppy ears. Brown nose. Wet eyes."),
        ("a sentence\nthat wraps\n\nAnother paragraph", "A sentence that wraps. Another paragraph."),
        ("```text\nA dog.\n```", "A dog."),
        ("| Part | Color |\n|:---|---|\n| ear | red |", "Part, Color. Ear, red."),
        ("> A quoted\n> dog", "A quoted dog."),
        ("A [dog](http://x.example/y) runs<br>fast", "A dog runs fast."),
        ("  spaces \t and\n breaks ", "Spaces and breaks."),
        ('"A dog."', "A dog."),
        ("\u201cA dog\u201d.", "A dog."),
        ("'It\u2019s the dog's ball.'", "It\u2019s the dog's ball."),
        ('"A dog lies', "A dog lies."),
        ('The label reads "STOP"', 'The label reads "STOP"'),
        ('"STOP" is what the "sign" says.', '"STOP" is what the "sign" says.'),
        ("about 2.5 times as wide as 30", "About 2.5 times as wide as 30"),
        ("\u00e9tag\u00e8re", "\u00c9tag\u00e8re."),
        ("a\x00b\ud800c\x07d", "A b c d."),
    ],
)  # fmt: skip
def test_markup_goes_and_words_stay(raw: str, text: str) -> None:
    assert clean(raw) == text


@pytest.mark.parametrize(
    "opening",
    [
        "The image shows ",
        "This photo depicts ",
        "the picture features ",
        "This close-up photo showcases ",
        "A close-up shows that ",
        "The provided image clearly displays ",
        "Sure! Here is a caption for the image:\n\n",
        "Certainly! Here's a 50-word description: The image shows ",
        "Of course. ",
        "In this image, ",
        "In the photo, we can see ",
        "Based on the photo, ",
        "Based on the photo of the cat, ",
        "Looking at the image provided, ",
        "In the picture ",
        "The primary visual characteristics of the Bengal cat are: ",
        "The primary shape characteristics of this cat include ",
        "Its key texture features in this photo are ",
        "Caption: ",
        "**Description:** ",
        "Primary visual characteristics: ",
        "Caption: This is a photo of ",
        "The image is of ",
        "A photo of ",
    ],
)
def test_boilerplate_openings_go(opening: str) -> None:
    assert clean(f"{opening}a small cat on a mat.") == "A small cat on a mat."


@pytest.mark.parametrize(
    "text",
    [
        "The dog's picture shows on a wall behind it.",
        "Sure-footed on rock, the goat climbs.",
        "Photographed from above, the cat rests.",
        "Here is where the cat sleeps: a mat.",
        "The features of the cat are striking.",
        "In the field, a horse grazes.",
        "The image of the cat on its collar shows a fish.",
    ],
)
def test_what_only_looks_like_boilerplate_stays(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("raw", ["", " \n", "- - -", "```\n```", "Sure!", "Caption:", "**", "|---|"])
def test_boilerplate_alone_leaves_nothing(raw: str) -> None:
    assert clean(raw) == ""


@settings(max_examples=1500)
@given(answers)
def test_cleaning_twice_is_cleaning_once(raw: str) -> None:
    text = clean(raw)
    assert clean(text) == text
    assert text == " ".join(text.split())
    assert not text[-1:].isalpha()
    text.encode()
    assert "\x00" not in text


@pytest.mark.parametrize(
    "letter",
    sorted({*string.punctuation, *" \t\n\x01a7_", *"\u2022\u2013\u2018\u2019\u201c\u201d\u2026\u3002\u00e9\u65e5"}),
)
def test_a_letter_over_and_over_takes_no_longer_than_the_text_is_long(letter: str) -> None:
    began = time.process_time()
    for before, after in (("", ""), ("x", "y"), ("[", ""), ("```", "x"), ("|a|", "|x")):
        clean(before + letter * 40_000 + after)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "piece", ["_a ", "[a](", "![a]", "- ", "> ", "<p ", "1. ", "# ", "|a", "** ", "`a ", "(", "]("]
)
def test_markup_over_and_over_takes_no_longer_than_the_text_is_long(piece: str) -> None:
    began = time.process_time()
    clean(piece * (40_000 // len(piece)))
    assert time.process_time() - began < 2


words = st.sampled_from(["soft", "coat", "two", "ears", "near", "its", "Nose", "3", "paws"])
marks = st.sampled_from([" ", "\n", "\n- ", " **", "** ", "\n\n## ", "`", ", ", "\n1. ", " | ", '"', "\n> "])


@given(st.lists(st.tuples(marks, words), min_size=1, max_size=20))
def test_no_letter_of_the_caption_is_lost(pieces: list[tuple[str, str]]) -> None:
    raw = "".join(mark + word for mark, word in pieces)
    assert re.sub("[^a-z]", "", clean(raw).lower()) == re.sub("[^a-z]", "", raw.lower())


@given(st.text())
def test_what_cannot_be_stored_becomes_a_space(text: str) -> None:
    kept = storable(text)
    assert len(kept) == len(text)
    assert all(b == (" " if a == "\x00" or "\ud800" <= a <= "\udfff" else a) for a, b in zip(text, kept, strict=True))
