"""Models that think aloud: what they thought is not the caption."""

import re

#: (open, close) of the families that write their thoughts into the text.
TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("\u25c1think\u25b7", "\u25c1/think\u25b7"))
_MARKS = re.compile("(" + "|".join(mark for pair in TAGS for mark in pair) + ")", re.IGNORECASE)


def strip_thinking(text: str) -> str:
    """The text without `<think>...</think>` (or `<thinking>`, or Kimi's `◁think▷`) blocks, stripped of outer space.

    A close without an open ends a thought whose open was in the prompt: all before it goes. An open without a close is
    a thought cut off by the token limit: all after it goes. Linear in the text's length.
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
            if not inside:
                kept.clear()
            inside = False
    return "".join(kept).strip()
