"""Shortening a caption where it hurts least: at the end of a sentence, else between two words."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence

from services.captioner.quality.words import FUNCTION_WORDS

_STOP = re.compile(r"(?<![.!?\u2026])[.!?\u2026]++[\"')\]\u2019\u201d\u00bb]*+(?=\s|$)|[\u3002\uff01\uff1f]++")
_NEXT = re.compile(r"\s*+(\S?)")
_LONGEST_WORD = 16  # looked at before a stop; abbreviations are shorter
_ABBREVIATIONS = frozenset({"approx", "ca", "cf", "dr", "e.g", "etc", "i.e", "mr", "mrs", "ms", "mt", "no", "st", "vs"})


def sentence_ends(text: str) -> list[int]:
    """Where each sentence ends, as an index behind its full stop and closing quotes. "St. Bernard", "e.g. red", "2.5"
    and "J. Smith" do not end one; a last sentence without a full stop does not count."""
    ends = []
    for stop in _STOP.finditer(text):
        before = text[max(0, stop.start() - _LONGEST_WORD) : stop.start()]
        word = before.rpartition(" ")[2].lstrip("(\"'\u2018\u201c").lower()
        after = _NEXT.match(text, stop.end())
        follows = after[1] if after else ""
        if follows.islower() or (follows and (word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()))):
            continue
        ends.append(stop.end())
    return ends


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
