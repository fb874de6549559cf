"""What the model is asked, and what is kept of its answer.

Source of the prompt: MMFT (arXiv 2601.21426), one call per characteristic."""

import re

PROMPT = (
    "To differentiate this {class_name} photo from other {domain} photos, describe its primary {characteristic} "
    "characteristics based on the photo in {words} words."
)

_MARKDOWN = re.compile(r"(\*\*|__|`+|^#+\s*|^\s*[-*•]\s+|^\s*\d+[.)]\s+)", re.MULTILINE)
_OPENING = re.compile(
    r"^(?:(?:sure|certainly|of course|here is|here's)[^.:!]*[.:!]\s*)?"
    r"(?:(?:the|this)\s+(?:image|photo|picture|photograph)\s+(?:shows|depicts|features|displays|presents|portrays)\s+)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(r"\b(?:i can(?:no|')t|i am unable|i'm unable|i'm sorry|as an ai)\b", re.IGNORECASE)


def caption_prompt(class_name: str, domain: str, characteristic: str, words: int) -> str:
    """`class_name` in its display form (lower case, `_` and `-` as spaces)."""
    return PROMPT.format(class_name=class_name, domain=domain, characteristic=characteristic, words=words)


def clean(raw: str) -> str:
    """Plain sentences on one line: no markdown, no quotes around, no "The image shows"."""
    text = " ".join(_MARKDOWN.sub("", raw).split()).strip("\"'“” ")
    text = _OPENING.sub("", text)
    return text[:1].upper() + text[1:]


def flags(text: str) -> list[str]:
    """Why a caption is left out of training by default; it stays visible."""
    if not text:
        return ["empty"]
    return ["refusal"] if _REFUSAL.search(text) else []
