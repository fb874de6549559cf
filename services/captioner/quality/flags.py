"""What is wrong with a caption, judged from its text alone. A flagged caption stays visible; which flags keep it out of
training is the run's choice."""

import re
from collections.abc import Sequence
from itertools import islice

from services.captioner.quality.words import FUNCTION_WORDS, Names, mentions, words
from shared.schemas.captions import Flag

_APOSTROPHE = "['\u2019]"
_REFUSAL = re.compile(
    rf"\bI(?: am|{_APOSTROPHE}m)\s+(?:very\s+)?(?:sorry|unable|not able|afraid)\b"
    r"|\bI\s+apologi[sz]e\b"
    rf"|\bI\s+(?:can\s?not|can{_APOSTROPHE}t|could not|couldn{_APOSTROPHE}t|do not|don{_APOSTROPHE}t|won{_APOSTROPHE}t|"
    r"will not)\s+(?:\w+\s+)?(?:see|view|describe|identify|determine|provide|assist|help|comply|fulfil|answer|recogni|"
    r"have|process|access|discuss)"
    r"|\bas an? (?:AI|artificial intelligence|language model|text-based)\b"
    r"|\b(?:unable|not able|not possible) to (?:see|view|access|process|provide|describe|identify|assist|display)\b"
    r"|\bno (?:image|photo|picture)s? (?:(?:is|was|were|has been|have been) )?(?:provided|attached|visible|uploaded)\b"
    r"|\bplease (?:provide|upload|share|attach|send) (?:me )?(?:the|an?|another|your) (?:image|photo|picture)\b",
    re.IGNORECASE,
)
_LOOKED_AT = 1_000  # words at the end, where a model that runs into a loop stays in it
_LANGUAGES: dict[str, tuple[str, ...]] = {}
for _language, _function_words in FUNCTION_WORDS.items():
    for _word in _function_words:
        _LANGUAGES[_word] = (*_LANGUAGES.get(_word, ()), _language)


def flags(text: str, own: str, names: Names, language: str | None) -> list[Flag]:
    """Every flag but those of length, which need a tokenizer, and those that compare captions.

    own: the class's display name; names: all of the data set's; language: "en", or None for any."""
    found = words(text)
    if not found:
        return ["empty"]
    checks: tuple[tuple[Flag, bool], ...] = (
        ("refusal", _REFUSAL.search(text) is not None),
        ("repetition", loops(found)),
        ("wrong_language", language == "en" and not _english(text, found)),
        ("names_other_class", names.another(own, found)),
        # scripts that set no spaces between words have no words to find
        ("label_missing", not mentions(own, found) and own.casefold() not in text.casefold()),
    )
    return [flag for flag, holds in checks if holds]


def loops(found: Sequence[str]) -> bool:
    """Has the model run into a loop? True where words repeat in direct succession: one word 4 times, two or three words
    3 times, 4 to 7 words 3 times or 8 and more twice; or where of 24 and more words fewer than half of the
    three-word runs are different ones. Succession is looked for in the last 1,000 words."""
    trigrams = list(zip(found, islice(found, 1, None), islice(found, 2, None), strict=False))
    distinct = len(set(trigrams))
    if distinct == len(trigrams):
        return False  # each of the above repeats three words in a row
    if len(found) >= 24 and 2 * distinct < len(trigrams):
        return True
    found = found[-_LOOKED_AT:]
    for period in range(1, len(found) // 2 + 1):
        wanted = period * (3 if period == 1 else 2 if period < 8 else 1)  # words that equal the word a period before
        run = 0
        for before, word in zip(found, islice(found, period, None), strict=False):
            run = run + 1 if before == word else 0
            if run >= wanted:
                return True
    return False


def _english(text: str, found: Sequence[str]) -> bool:
    """False where more than a fifth of the letters are not Latin, or, in 8 words and more, where another language's
    function words (3 or more) are over twice the English ones."""
    if not text.isascii():
        letters = [letter for letter in text if letter.isalpha()]
        if 5 * sum(letter > "\u024f" and not "\u1e00" <= letter <= "\u1eff" for letter in letters) > len(letters):
            return False
    if len(found) < 8:
        return True
    counts = dict.fromkeys(FUNCTION_WORDS, 0)
    for word in found:
        for language in _LANGUAGES.get(word, ()):
            counts[language] += 1
    english = counts.pop("en")
    most = max(counts.values())
    return most < 3 or most <= 2 * english
