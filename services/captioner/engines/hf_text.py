"""From what a model writes to what a caller sees: thoughts are left out, the text ends before the first stop string,
and it may be sent piece by piece while it is written."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from services.captioner.engines.thinking import MARKS, TAGS, without_thoughts

logger = logging.getLogger(__name__)

_UNFINISHED = "\ufffd"  # what bytes that are not yet a whole character decode to


def visible(raw: str, stop: Sequence[str] = (), opened: str = "", *, sent: bool = False) -> tuple[str, bool]:
    """The text that a caller sees of `raw`, and whether a stop string ended it.

    Thoughts are removed as `without_thoughts` does; `opened` is the one that the prompt itself began ("<think>"), if
    any, and `sent` says that the text is sent while it is written. Stop strings are sought in what is left, after
    leading white space.
    """
    text = without_thoughts(opened + raw, sent=sent).lstrip()
    cut = min((at for string in stop if (at := text.find(string)) >= 0), default=None)
    return text[:cut].rstrip(), cut is not None


def settled(raw: str, stop: Sequence[str] = (), opened: str = "") -> str:
    """The longest known beginning of `visible(raw + rest, sent=True)` for every possible rest of the text."""
    raw = raw.rstrip(_UNFINISHED)
    text = without_thoughts(opened + raw[: len(raw) - _begun(raw.lower(), MARKS)], sent=True).lstrip()
    cut = min((at for string in stop if (at := text.find(string)) >= 0), default=len(text) - _begun(text, stop))
    return text[:cut].rstrip()


def opened_by(prompt: str) -> str:
    """The thought that a prompt begins and leaves to the model to end, "" if none."""
    prompt = prompt.lower()
    last = max(TAGS, key=lambda pair: prompt.rfind(pair[0]))
    return last[0] if prompt.rfind(last[0]) > prompt.rfind(last[1]) else ""


def _begun(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = max((len(string) for string in strings), default=0)
    return next(
        (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in strings)), 0
    )


class Stream:
    """What the caller of one request was sent so far. It outlives a try: a second one goes on where the first ended."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text: Callable[[str], None] | None = on_text
        self.sent = ""

    def send(self, text: str) -> None:
        """`text` is all that is settled. What was sent already is not sent again; a text that begins otherwise, as a
        second try may, is not sent at all."""
        if self._on_text is None or len(text) <= len(self.sent) or not text.startswith(self.sent):
            return
        piece, self.sent = text[len(self.sent) :], text
        try:
            self._on_text(piece)
        except Exception:  # one caller's trouble must not end the batch of all the others
            logger.warning("a stream of text broke off: its receiver failed", exc_info=True)
            self._on_text = None


class Transcript:
    """The text of one row, token by token, for requests that stop at strings or want the text as it is written."""

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Collection[int],
        limit: int,
        stop: Sequence[str] = (),
        opened: str = "",
        stream: Stream | None = None,
    ) -> None:
        self._tokenizer, self._end_ids, self._limit = tokenizer, end_ids, limit
        self._stop, self._opened, self._stream = stop, opened, stream
        self._ids: list[int] = []
        # Decoded a few tokens at a time: ids[context:done] were decoded last, into the end of `raw`. They are decoded
        # again before the new ones, as some tokenizers write a token differently at the beginning of a text.
        self._context = self._done = 0
        self._raw = ""
        self.stopped = False  # at a stop string
        self.tokens = 0  # written, the end token too

    def add(self, token: int) -> bool:
        """Whether the row is over with this token. Negative: the model failed, there is none."""
        self.tokens += 1
        if token < 0 or token in self._end_ids:
            return True
        self._ids.append(token)
        pending = self._pending()
        if not pending.endswith(_UNFINISHED):
            self._raw += pending
            self._context, self._done = self._done, len(self._ids)
            self.stopped = bool(self._stop) and self._visible(self._raw)[1]
        if self._stream is not None:
            self._stream.send(settled(self._raw, self._stop, self._opened))
        return self.stopped or self.tokens == self._limit

    def text(self) -> str:
        """What a caller sees of it in the end."""
        text, self.stopped = self._visible(self._raw + self._pending())
        return text

    def _visible(self, raw: str) -> tuple[str, bool]:
        return visible(raw, self._stop, self._opened, sent=self._stream is not None)

    def _pending(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
