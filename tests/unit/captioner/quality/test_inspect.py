"""From an answer to a caption within the budget of a CLIP."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.quality.inspect import FEWEST_WORDS, MAX_RAW, Answer, Inspector
from shared.clip.templates import prefixed
from shared.clip.tokens import token_counter
from shared.errors import InvalidInput

COUNTER = token_counter("starter", Path())
CLASSES = ["golden retriever", "cat"]
INSPECTOR = Inspector(COUNTER, CLASSES)
SENTENCE = "The retriever has a long soft coat of many colors. "
LONG = "A retriever with " + "very long and soft and warm and bright, " * 20 + "hair."


def tokens(text: str) -> int:
    return COUNTER.count(prefixed("golden retriever", text))


def test_a_good_answer_is_cleaned_and_measured() -> None:
    found = INSPECTOR.finish("The image shows **a golden retriever** on grass", "golden retriever")
    assert found.text == "A golden retriever on grass."
    assert (found.clip_tokens, found.flags, found.trimmed) == (tokens(found.text), [], False)
    draft = INSPECTOR.measure("The image shows **a golden retriever** on grass", "golden retriever")
    assert (draft.text, draft.clip_tokens, draft.over_budget) == (found.text, found.clip_tokens, False)


def test_what_is_over_budget_is_trimmed_at_a_sentence() -> None:
    parts = ["nose", "tail", "left ear", "chest", "muzzle", "back", "belly", "jaw", "neck", "paw", "eye", "coat"]
    looks = ["long", "round", "dark", "soft", "shiny", "wide", "pale", "thin", "short", "curved", "small", "fine"]
    pairs = zip(parts, looks, reversed(looks), strict=True)
    raw = "A retriever. " + " ".join(f"Its {part} seems {one}, even {other}." for part, one, other in pairs)
    draft = INSPECTOR.measure(raw, "golden retriever")
    assert draft.over_budget
    assert draft.clip_tokens == tokens(draft.text) > COUNTER.context_length
    found = INSPECTOR.finish(raw, "golden retriever")
    assert draft.text.startswith(found.text)
    assert found.text.endswith(".")
    assert found.clip_tokens == tokens(found.text) <= COUNTER.context_length
    one_more = draft.text[: draft.text.index(".", len(found.text)) + 1]
    assert tokens(one_more) > COUNTER.context_length
    assert (found.flags, found.trimmed) == ([], True)


def test_a_first_sentence_over_budget_is_kept_whole_and_flagged() -> None:
    found = INSPECTOR.finish(f"{LONG} It barks.", "golden retriever")
    assert found.text == LONG
    assert found.clip_tokens > COUNTER.context_length
    assert "over_budget" in found.flags


@given(st.text() | st.lists(st.sampled_from([SENTENCE, "A cat. ", LONG, "**", "\n", "so, "]), max_size=12).map("".join))
def test_kept_texts_fit_or_are_flagged_and_inspecting_them_again_changes_nothing(raw: str) -> None:
    found = INSPECTOR.finish(raw, "golden retriever")
    assert found.clip_tokens == tokens(found.text)
    assert ("over_budget" in found.flags) == (found.clip_tokens > COUNTER.context_length)
    again = INSPECTOR.finish(found.text, "golden retriever")
    assert (again.text, again.clip_tokens) == (found.text, found.clip_tokens)


def test_an_answer_cut_by_the_token_limit_loses_its_broken_sentence() -> None:
    found = INSPECTOR.finish("A retriever runs. It has lo", "golden retriever", "length")
    assert (found.text, found.trimmed) == ("A retriever runs.", True)
    assert INSPECTOR.finish("A retriever runs. It has fur.", "golden retriever", "length").text.endswith("It has fur.")
    assert INSPECTOR.finish("A retriever runs. It has lo", "golden retriever", "stop").text.endswith("It has lo.")


def test_many_at_once_are_inspected_as_each_alone() -> None:
    raws = [
        "A retriever runs. It has lo",
        "",
        SENTENCE * 12,
        "**\u6f22 caf\u00e9 cat**",
        LONG,
        "\ud800",
        "x" * (MAX_RAW + 1),
    ]
    answers = [Answer(raw, name, reason) for raw in raws for name in CLASSES for reason in ("stop", "length")]
    assert INSPECTOR.finish_all(answers) == [INSPECTOR.finish(*each) for each in answers]
    assert INSPECTOR.finish_all([]) == []


def test_a_loop_is_flagged_also_where_trimming_cut_it_off() -> None:
    raw = "A retriever runs. " + "It is red and " * 30
    found = INSPECTOR.finish(raw, "golden retriever", "length")
    assert (found.text, found.flags) == ("A retriever runs.", ["repetition"])


def test_flags_come_in_their_fixed_order() -> None:
    text = "I'm sorry, a cat " + "and so on " * 60
    flags = ["refusal", "over_budget", "repetition", "names_other_class", "label_missing"]
    assert INSPECTOR.finish(text, "golden retriever").flags == flags


def test_fewer_words_follow_the_excess() -> None:
    draft = INSPECTOR.measure(SENTENCE * 12, "golden retriever")
    first = INSPECTOR.fewer_words(50, draft)
    excess = (draft.clip_tokens - draft.prefix_tokens) / (COUNTER.context_length - draft.prefix_tokens)
    assert 0.8 * 50 / excess < first < 50 / excess
    barely = INSPECTOR.measure("The retriever is " + "soft " * 64, "golden retriever")
    assert barely.over_budget
    assert FEWEST_WORDS <= INSPECTOR.fewer_words(50, barely) < 50
    assert INSPECTOR.fewer_words(6, INSPECTOR.measure(SENTENCE * 60, "golden retriever")) == FEWEST_WORDS


def test_shearing_equalises_lengths() -> None:
    inspector = Inspector(COUNTER, CLASSES, shear_tokens=24)
    found = inspector.finish(SENTENCE * 3, "golden retriever")
    assert found.clip_tokens == tokens(found.text) <= 24
    assert found.text == SENTENCE.strip()
    found = inspector.finish(LONG, "golden retriever")
    assert 18 <= found.clip_tokens == tokens(found.text) <= 24
    assert found.text.endswith(".")
    assert (found.trimmed, "over_budget" in found.flags) == (True, False)
    assert not inspector.finish("A retriever.", "golden retriever").trimmed


def test_shearing_below_the_prefix_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'a photo of a golden retriever\.' alone takes \d+ tokens") as caught:
        Inspector(COUNTER, CLASSES, shear_tokens=10)
    assert (caught.value.code, caught.value.param) == ("shear_too_short", "shear_tokens")


def test_an_edit_is_kept_as_it_is_but_measured_and_flagged() -> None:
    text = "**The image shows** a cat\n\n" + SENTENCE * 10 + "\x00"
    found = INSPECTOR.edited(text, "golden retriever")
    assert found.text == text[:-1] + " "
    assert found.clip_tokens == tokens(found.text)
    assert found.flags == ["over_budget", "repetition", "names_other_class"]
    assert not found.trimmed


@pytest.mark.parametrize("piece", ["Caption: ", "A cat. ", "cat ", "a b c d e f g ", "'\u2018"])
def test_of_an_endless_answer_the_beginning_is_read(piece: str) -> None:
    raw = piece * (1_000_000 // len(piece))
    began = time.process_time()
    assert len(INSPECTOR.measure(raw, "cat").text) <= MAX_RAW + 1
    found = INSPECTOR.finish(raw, "cat")
    assert time.process_time() - began < 5
    assert len(found.text) <= MAX_RAW + 1
    assert found.trimmed


def test_a_cut_answer_ends_with_a_whole_sentence() -> None:
    assert INSPECTOR.finish("A cat. It is lo" + " " * MAX_RAW + "ng.", "cat").text == "A cat."


def test_any_language_where_none_is_asked_for() -> None:
    text = "Eine cat mit kurzem Fell liegt auf dem Boden und ist m\u00fcde."
    assert INSPECTOR.finish(text, "cat").flags == ["wrong_language"]
    assert Inspector(COUNTER, CLASSES, language=None).finish(text, "cat").flags == []
