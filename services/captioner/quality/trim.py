"""Shortening a caption where it hurts least: at the end of a sentence, else between two words."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from services.captioner.quality.words import FUNCTION_WORDS
from shared.sentences import sentence_ends


def trim(text: str, fits: Callable[[str], bool]) -> str:
    """The most whole sentences that fit; the first one alone where even that does not. Where a text fits, so must any
    beginning of it."""
    ends = sentence_ends(text) or [len(text)]
    fitting = bisect_left(ends, True, key=lambda end: not fits(text[:end]))
    return text[: ends[max(fitting, 1) - 1]]


def shear(text: str, fits: Callable[[str], bool]) -> str:
    """Text shearing: the most whole sentences that fit, if these are at least half the words that would fit; else as
    many words as fit, closed with a full stop. At least one word stays."""
    words = text.split()
    if not words or fits(text):
        return text
    most = max(1, bisect_left(range(1, len(words)), True, key=lambda n: not fits(_closed(words[:n]))))
    by_word, by_sentence = _closed(words[:most]), trim(text, fits)
    if fits(by_sentence) and 2 * len(by_sentence.split()) >= len(by_word.split()):
        return by_sentence
    return by_word


def without_cut_sentence(text: str) -> str:
    """Without the last sentence, which the token limit broke off, if another one is left. The text must be cleaned: a
    broken sentence then ends with a full stop or with no stop at all."""
    ends = [end for end in sentence_ends(text) if end < len(text)]
    return text[: ends[-1]] if ends else text


def _closed(words: Sequence[str]) -> str:
    """'a red hat with the' -> 'a red hat.'"""
    last = len(words)
    while last > 1 and words[last - 1].lower() in FUNCTION_WORDS["en"]:
        last -= 1
    text = " ".join(words[:last]).rstrip(" ,;:-\u2013\u2014(")
    return text if text.endswith((".", "!", "?")) else f"{text}."
