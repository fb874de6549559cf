"""A JSON file read one element of its outermost list or object at a time, so that memory does not grow with it."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from shared.errors import InvalidInput

MAX_ELEMENT: Final = 1 << 20  # characters; the captions of one image
_CHUNK: Final = 1 << 16
_SPACE: Final = re.compile(r"[ \t\n\r]*")
# As floats, because `int` refuses thousands of digits with an error of its own; no number here means anything.
_DECODER: Final = json.JSONDecoder(parse_int=float)


def elements(file: BinaryIO) -> Iterator[tuple[str | None, Any]]:
    """(key, value) for each entry of an object, a repeated key as often as it is there; (None, value) for each entry of
    a list. Bytes that are no UTF-8 come out as lone surrogates. Raises InvalidInput (`broken_json`), naming the line.
    """
    text = _Text(file)
    opening = text.take("{[")
    closing = "}" if opening == "{" else "]"
    if text.peek() == closing:
        text.take(closing)
    else:
        while True:
            key = None
            if opening == "{":
                if text.peek() != '"':
                    raise text.broken("a key in quotes is missing")
                key = text.value()
                text.take(":")
            yield key, text.value()
            if text.take("," + closing) == closing:
                break
    if text.peek():
        raise text.broken("something follows its end; is it JSONL?")


class _Text:
    """The part of the file that is in memory, and how far it has been used."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, allowed: str) -> str:
        """The next character, which must be one of `allowed`."""
        found = self.peek()
        if not found:
            raise self.broken("it ends too early")
        if found not in allowed:
            raise self.broken(f"expected {' or '.join(allowed)}, not {found}")
        self._at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.broken("it is nested too deeply") from error
            except ValueError as error:
                if len(self._text) - self._at > MAX_ELEMENT:
                    raise self.broken(f"an entry is no JSON, or longer than {MAX_ELEMENT:,} characters") from error
                if not self._more():
                    raise self.broken("an entry is no JSON") from error
            else:
                if end < len(self._text):
                    self._at = end
                    return value
                if not self._more():  # where there is more, a number may go on in it
                    self._at = len(self._text)
                    return value

    def broken(self, why: str) -> InvalidInput:
        line = self._line + self._text.count("\n", 0, self._at)
        return InvalidInput(f"The file is no valid JSON: {why} (line {line}).", code="broken_json", param="file")

    def _more(self) -> bool:
        """Read on, at least doubling what is left unused, so that a long entry is not tried too often."""
        rest = self._text[self._at :]
        self._line += self._text.count("\n", 0, self._at)
        piece = self._file.read(max(_CHUNK, len(rest)))
        self._text, self._at = rest + piece, 0
        return bool(piece)
