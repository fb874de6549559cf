"""One caption's way from what the model said to what is kept: cleaned, measured in CLIP tokens, shortened, flagged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.captioner.quality.clean import clean, storable
from services.captioner.quality.flags import flags, loops
from services.captioner.quality.trim import shear, trim, without_cut_sentence
from services.captioner.quality.words import Names, words
from shared.clip.templates import photo_of, prefixed
from shared.clip.tokens import TokenCounter
from shared.errors import InvalidInput
from shared.schemas.captions import FLAGS, Flag

FEWEST_WORDS = 5  # the least that a prompt asks for
MAX_RAW = 8_000  # characters of an answer that are read; several times the longest caption one may ask for
_MARGIN = 0.9  # of the words that would just fit: models overshoot, and the trimming after loses whole sentences
_LEAST_SHEARED = 4  # tokens beyond the prefix; fewer would keep a word or two


class Answer(NamedTuple):
    """What a model said of an image of a class. finish_reason "length": it was stopped at its token limit."""

    raw: str
    display_name: str
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Draft:
    """A cleaned answer. Tokens are the CLIP's, of the prefixed caption, start and end included."""

    text: str
    clip_tokens: int
    over_budget: bool
    prefix_tokens: int  # the same of the prefix alone


@dataclass(frozen=True)
class Inspected:
    text: str
    clip_tokens: int  # of the prefixed caption, start and end included
    flags: list[Flag]
    trimmed: bool  # shorter than the cleaned answer


class Inspector:
    """The rules of one job. The budget is the CLIP's context: what is longer, prefix included, its text tower cuts.

    display_names: of all classes of the data set; shear_tokens: text shearing, a length in CLIP tokens that no prefixed
    caption exceeds; language: "en", or None where any will do. Raises InvalidInput where `shear_tokens` leaves no room
    beside a class's prefix. Safe to share between threads."""

    def __init__(
        self,
        counter: TokenCounter,
        display_names: Sequence[str],
        *,
        shear_tokens: int | None = None,
        language: str | None = "en",
    ) -> None:
        self._counter, self._shear_tokens, self._language = counter, shear_tokens, language
        self._names = Names(display_names)
        self._prefix_tokens: dict[str, int] = {}
        longest = max(display_names, key=self._prefix, default=None) if shear_tokens is not None else None
        if shear_tokens is not None and longest is not None:
            least = self._prefix(longest) + _LEAST_SHEARED
            if shear_tokens < least:
                raise InvalidInput(
                    f"shear_tokens {shear_tokens} leaves no room for a caption: '{photo_of(longest)}' alone takes"
                    f" {self._prefix(longest)} tokens. Give {least} or more.",
                    code="shear_too_short",
                    param="shear_tokens",
                )

    def measure(self, raw: str, display_name: str) -> Draft:
        text = clean(raw[:MAX_RAW])
        tokens = self._count(display_name, text)
        return Draft(text, tokens, tokens > self._counter.context_length, self._prefix(display_name))

    def fewer_words(self, words: int, draft: Draft) -> int:
        """How many words to ask for next, where `words` gave an overlong draft: in proportion to the room there is,
        with a margin, at least FEWEST_WORDS. The answer is less than `words` unless that was the least already."""
        room = self._counter.context_length - draft.prefix_tokens
        used = max(1, draft.clip_tokens - draft.prefix_tokens)
        return max(FEWEST_WORDS, min(words - 1, int(words * _MARGIN * room / used)))

    def finish(self, raw: str, display_name: str, finish_reason: str = "stop") -> Inspected:
        """Of a model that was stopped at its token limit a broken last sentence is dropped where another is left. So it
        is in an answer of more than MAX_RAW characters, which is cut there. A first sentence longer than the budget is
        kept whole and flagged over_budget."""
        return self.finish_all([Answer(raw, display_name, finish_reason)])[0]

    def finish_all(self, answers: Sequence[Answer]) -> list[Inspected]:
        """`finish` of each, for less: their tokens are counted at once."""
        read = [_read(each) for each in answers]
        counts = self._counter.counts(
            [prefixed(each.display_name, text) for each, (_, text) in zip(answers, read, strict=True)]
        )
        return [
            self._finished(each, cleaned, text, tokens)
            for each, (cleaned, text), tokens in zip(answers, read, counts, strict=True)
        ]

    def _finished(self, answer: Answer, cleaned: str, text: str, tokens: int) -> Inspected:
        display_name = answer.display_name
        shortened = text
        if tokens > self._counter.context_length:
            shortened = trim(text, lambda part: self._fits(display_name, part, self._counter.context_length))
        limit = self._shear_tokens
        if limit is not None and tokens > limit:
            shortened = shear(shortened, lambda part: self._fits(display_name, part, limit))
        if shortened != text:
            tokens = self._count(display_name, shortened)
        found = self._flags(shortened, display_name, tokens)
        # A loop tells of the answer, also where the repetitions were cut off.
        if shortened != cleaned and "repetition" not in found and loops(words(cleaned)):
            found = [flag for flag in FLAGS if flag in (*found, "repetition")]
        return Inspected(shortened, tokens, found, trimmed=len(answer.raw) > MAX_RAW or shortened != cleaned)

    def edited(self, text: str, display_name: str) -> Inspected:
        """A human's words: as they are (but for what cannot be stored), measured and flagged."""
        text = storable(text)
        tokens = self._count(display_name, text)
        return Inspected(text, tokens, self._flags(text, display_name, tokens), trimmed=False)

    def _flags(self, text: str, display_name: str, tokens: int) -> list[Flag]:
        found = flags(text, display_name, self._names, self._language)
        if tokens > self._counter.context_length:
            found.append("over_budget")
        return [flag for flag in FLAGS if flag in found]

    def _count(self, display_name: str, text: str) -> int:
        return self._counter.count(prefixed(display_name, text))

    def _fits(self, display_name: str, text: str, limit: int) -> bool:
        return self._count(display_name, text) <= limit

    def _prefix(self, display_name: str) -> int:
        if display_name not in self._prefix_tokens:
            self._prefix_tokens[display_name] = self._counter.count(photo_of(display_name))
        return self._prefix_tokens[display_name]


def _read(answer: Answer) -> tuple[str, str]:
    """The cleaned answer, and the same without a sentence that was broken off."""
    raw, finish_reason = answer.raw, answer.finish_reason
    if len(raw) > MAX_RAW:
        raw, finish_reason = raw[:MAX_RAW], "length"
    cleaned = clean(raw)
    if finish_reason == "length" and not raw.rstrip(" \n\"'*`\u201d").endswith((".", "!", "?")):
        return cleaned, without_cut_sentence(cleaned)
    return cleaned, cleaned
