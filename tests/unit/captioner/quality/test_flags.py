"""Flags of one text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.quality.flags import flags, loops
from services.captioner.quality.words import Names, words
from shared.schemas.captions import Flag

NAMES = Names(["cat", "dog"])
GOOD = "A cat with a short grey coat and green eyes lies on the wooden floor in front of a window."


def flagged(text: str, language: str | None = "en") -> list[Flag]:
    return flags(text, "cat", NAMES, language)


def test_a_good_caption_has_none() -> None:
    assert flagged(GOOD) == []
    assert flagged("A cat, a cat, and a cat that can't see the very, very, very small caf\u00e9.") == []


@pytest.mark.parametrize("text", ["", "  ", "...", "\u2014 !", "\n"])
def test_empty_is_the_only_flag_of_an_empty_text(text: str) -> None:
    assert flagged(text) == ["empty"]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't describe this cat.",
        "I\u2019m unable to help with the cat.",
        "I cannot determine the breed of the cat.",
        "I do not have access to the cat.",
        "As an AI language model, a cat.",
        "Unable to view the image of a cat.",
        "No image was provided of the cat.",
        "Please upload an image of the cat.",
    ],
)
def test_refusals(text: str) -> None:
    assert flagged(text) == ["refusal"]


@pytest.mark.parametrize(
    "text",
    [
        "A cat that is that is that is that is big",
        "A cat cat cat cat",
        "The cat has a soft coat with fine hair. The cat has a soft coat with fine hair.",
        "A cat and a red hat, a red hat, a red hat",
        "A cat. " + "It is soft. It is warm. " * 6,
    ],
)
def test_loops(text: str) -> None:
    assert flagged(text) == ["repetition"]


@given(st.lists(st.sampled_from("abcdefghij"), min_size=3, max_size=12), st.integers(3, 6))
def test_any_run_of_words_said_again_and_again_is_a_loop(run: list[str], times: int) -> None:
    assert loops(["the", "cat", *run * times])


def test_a_list_with_the_same_frame_is_no_loop() -> None:
    assert not loops(
        words("It has a black nose, a black tail, a black ear, a black paw, a black eye and a black back.")
    )


@pytest.mark.parametrize(
    "text",
    [
        "Eine graue cat mit kurzem Fell und gr\u00fcnen Augen liegt auf dem Boden.",
        "Un cat gris avec des yeux verts est couch\u00e9 sur le sol dans la maison.",
        "El cat gris con los ojos verdes y una cola larga est\u00e1 en el suelo.",
        "Il cat grigio con gli occhi verdi \u00e8 nella casa e dorme sul letto.",
        "O cat cinza com os olhos verdes e uma cauda longa est\u00e1 no ch\u00e3o.",
        "Een grijze cat met groene ogen ligt op het bed voor het raam.",
        "\u0421\u0435\u0440\u0430\u044f \u043a\u043e\u0448\u043a\u0430, cat",
        "\u4e00\u53ea\u7070\u8272\u7684 cat \u5728\u5730\u677f\u4e0a",
    ],
)
def test_other_languages(text: str) -> None:
    assert flagged(text) == ["wrong_language"]
    assert flagged(text, language=None) == []


def test_a_few_foreign_words_are_no_other_language() -> None:
    assert flagged("A cat in the caf\u00e9 de la Paix, \u00e0 la carte, with a sign that says \u732b.") == []


def test_names_and_labels() -> None:
    assert flagged("A dog on the floor.") == ["names_other_class", "label_missing"]
    assert flagged("Something grey on the floor.") == ["label_missing"]
    assert flags("\u4e00\u53ea\u732b\u5728\u7761\u89c9", "\u732b", Names(["\u732b"]), None) == [], "no spaces, no words"
