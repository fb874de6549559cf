"""Which of an image's captions, and which parts of them, a method uses."""

from collections.abc import Sequence
from hashlib import sha256

from shared.sentences import sentences


def first_captions(captions: Sequence[str], count: int | None) -> list[str]:
    """The first `count` by the SHA-256 of their text, all where None. So the choice is the same in every run, whatever
    order the captions come in, it favours no characteristic, and a smaller count takes of what a larger one takes."""
    if count is None:
        return list(captions)
    return sorted(captions, key=lambda text: sha256(text.encode()).digest())[:count]


def with_sentences(captions: Sequence[str]) -> list[str]:
    """Each caption whole, followed by its sentences where it has more than one."""
    found: list[str] = []
    for caption in captions:
        parts = sentences(caption)
        found += [caption, *(parts if len(parts) > 1 else [])]
    return found
