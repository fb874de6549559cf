"""All that is printed for people goes through here. Names, captions and messages are of others' writing: an escape
sequence in one would move the cursor, hide lines or rename the window of whoever reads it, an admin perhaps."""

import json
import re
import sys

from pydantic import BaseModel


def printable(text: str) -> str:
    """One line: whatever does not print (line ends, control characters, a turn of the writing's direction) as `?`."""
    return "".join(c if c.isprintable() else "?" for c in text)


def printable_lines(text: str) -> str:
    """The same, but `\\n` and CSV's `\\r\\n` stay."""
    parts = re.split(r"(\r?\n)", text)
    parts[::2] = [printable(line) for line in parts[::2]]  # the others are the line ends
    return "".join(parts)


def say(text: str, end: str = "\n") -> None:
    print(printable_lines(text), end=end, flush=True)


def note(text: str) -> None:
    """To stderr: not what was asked for, but worth knowing."""
    print(printable_lines(text), file=sys.stderr, flush=True)


def say_json(body: object, indent: int | None = 2) -> None:
    """A model, or plain types. What does not print is escaped, as JSON may be: it reads back as it was."""
    text = body.model_dump_json(indent=indent) if isinstance(body, BaseModel) else json.dumps(body, indent=indent)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text), flush=True)
