"""Models that think aloud: what they thought is not the caption."""

import re

#: (open, close) of the families that write their thoughts into the text.
TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"))
MARKS = tuple(mark for pair in TAGS for mark in pair)
_MARKS = re.compile("(" + "|".join(MARKS) + ")", re.IGNORECASE | re.ASCII)  # no Turkish dotted capital I


def strip_thinking(text: str) -> str:
    """What `without_thoughts` leaves, stripped of outer space."""
    return without_thoughts(text).strip()


def without_thoughts(text: str, *, sent: bool = False) -> str:
    """The text without `<think>...</think>` (or `<thinking>`, or Kimi's `◁think▷`) blocks, in upper or lower case.

    A close without an open ends a thought whose open was in the prompt: all before it goes, unless it has been `sent`
    to the caller while it was written; then only the mark goes. An open without a close is a thought cut off by the
    token limit: all after it goes. Linear in the text's length.
    """
    kept: list[str] = []
    inside = False
    for part in _MARKS.split(text):
        if not _MARKS.fullmatch(part):
            if not inside:
                kept.append(part)
        elif part[1] != "/":
            inside = True
        else:
            if not inside and not sent:
                kept.clear()
            inside = False
    return "".join(kept)
