"""Where the sentences of a caption end."""

import re
from itertools import pairwise

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


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a last one without a full stop counts here."""
    ends = [0, *sentence_ends(text), len(text)]
    parts = (text[start:end].strip() for start, end in pairwise(ends))
    return [part for part in parts if part]
