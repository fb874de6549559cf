"""Shortening, with words as the measure of length."""

import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.quality.trim import sentence_ends, shear, trim, without_cut_sentence

TEXT = "A St. Bernard, approx. 2.5 years old. It is big! Is it a dog? Yes (really)."


def at_most(words: int) -> Callable[[str], bool]:
    return lambda text: len(text.split()) <= words


def test_sentences_end_at_full_stops_that_end_them() -> None:
    ends = sentence_ends(TEXT)
    assert [TEXT[a:b].strip() for a, b in zip([0, *ends], ends, strict=False)] == [
        "A St. Bernard, approx. 2.5 years old.",
        "It is big!",
        "Is it a dog?",
        "Yes (really).",
    ]
    assert sentence_ends("By J. Smith. No stop") == [12]


@pytest.mark.parametrize(
    ("words", "kept"),
    [(99, TEXT), (14, TEXT[:61]), (10, TEXT[:48]), (7, TEXT[:37]), (6, TEXT[:37]), (0, TEXT[:37])],
)
def test_trimming_keeps_the_most_whole_sentences_and_always_the_first(words: int, kept: str) -> None:
    assert trim(TEXT, at_most(words)) == kept
    assert trim("no sentence at all", at_most(words)) == "no sentence at all"


def test_a_long_text_is_trimmed_in_a_few_looks_and_little_memory() -> None:
    text, looks = "Ab cd. " * 20_000, []

    def fits(part: str) -> bool:
        looks.append(len(part))
        return len(part) < 300

    tracemalloc.start()
    try:
        assert trim(text, fits) == ("Ab cd. " * 42).strip()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(looks) < 20


@pytest.mark.parametrize("text", ["x" + "." * 40_000 + "y", ".'" * 20_000 + "y", "\u3002 x" * 10_000, "a. " * 10_000])
def test_finding_sentences_takes_no_longer_than_the_text_is_long(text: str) -> None:
    began = time.process_time()
    sentence_ends(text)
    assert time.process_time() - began < 2


def test_shearing_ends_at_a_sentence_that_keeps_half_else_at_a_word() -> None:
    text = "A cat. It sits on the warm red roof of a house, near the old chimney and the tree."
    assert shear(text, at_most(99)) == text
    assert shear(text, at_most(4)) == "A cat."
    assert shear(text, at_most(12)) == "A cat. It sits on the warm red roof of a house."
    assert shear(text, at_most(11)) == "A cat. It sits on the warm red roof.", "no dangling 'of a'"
    assert shear(text, at_most(0)) == "A."


@given(st.lists(st.sampled_from(["red,", "cat.", "of", "the", "house!", "big"]), min_size=1), st.integers(1, 30))
def test_sheared_text_fits_and_closes(words: list[str], limit: int) -> None:
    text = " ".join(words)
    sheared = shear(text, at_most(limit))
    assert len(sheared.split()) <= limit
    assert sheared == text or sheared[-1] in ".!?"


def test_a_broken_last_sentence_goes_where_another_is_left() -> None:
    assert without_cut_sentence("A dog. It has lo.") == "A dog."
    assert without_cut_sentence("A dog. It has 2") == "A dog."
    assert without_cut_sentence("A dog that has lo.") == "A dog that has lo."
