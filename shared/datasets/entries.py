"""What the zip and tar readers have in common: one record per entry, in archive order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["file", "directory", "link", "special", "encrypted", "unsupported"]

WHY_REFUSED: Final[dict[Kind, tuple[str, str]]] = {
    "link": ("link", "Links are not followed; pack the picture itself."),
    "special": ("special_file", "Devices, pipes and sockets are not accepted."),
    "encrypted": ("encrypted", "The file is encrypted; pack it without a password."),
    "unsupported": ("unsupported_compression", "This way of packing is not supported; use deflate, or tar."),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """`size` is what the header claims. `read(limit)` gives the content, or its first limit + 1 bytes where it is
    longer; it must be called before the next entry is asked for. It raises InvalidInput for a damaged file."""

    name: str
    kind: Kind
    size: int
    read: Callable[[int], bytes]


def decoded(name: str, codec: str) -> str:
    """A name that was read with the format's historical `codec`: as UTF-8 where it is that, which packers often do not
    say."""
    if name.isascii():
        return name
    try:
        return name.encode(codec).decode("utf-8")
    except UnicodeError:
        return name
