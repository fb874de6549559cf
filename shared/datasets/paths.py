"""Names inside an upload: made comparable, or refused. Nothing is ever extracted under these names, but they become
the images' identities, are shown, exported and used in URLs, so the same rules hold as for writing files."""

import re
import unicodedata
from typing import Final
from urllib.parse import unquote

from shared.errors import InvalidInput

MAX_LENGTH: Final = 1_024
_LITTER: Final = frozenset({"thumbs.db", "desktop.ini"})
_DRIVE: Final = re.compile(r"[A-Za-z]:")
# What is drawn as a slash or a backslash and is no compatibility form of it: fraction, division, big, set minus.
_SLASHES: Final = str.maketrans(dict.fromkeys("\u2044\u2215\u29f8\u2216\u29f5\u29f9\\", "/"))


def safe_path(name: str) -> str:
    """`./a//b.jpg` -> `a/b.jpg`, in Unicode's composed form (NFC), so a name typed on a Mac equals one typed elsewhere.

    Raises InvalidInput (code `unsafe_path`) for names that climb out, are absolute, or hide either behind backslashes,
    percent signs, look-alikes, NUL or other control characters.
    """
    if len(name) > MAX_LENGTH:
        raise _unsafe(f"is longer than {MAX_LENGTH} characters")
    if any(unicodedata.category(c) in {"Cc", "Cs"} for c in name) if not name.isascii() else not name.isprintable():
        raise _unsafe("contains control characters")
    if "\\" in name:
        raise _unsafe("contains a backslash; make the archive with '/' between folders")
    if name.startswith("/") or _DRIVE.match(name):
        raise _unsafe("is absolute")
    path = "/".join(part for part in unicodedata.normalize("NFC", name).split("/") if part not in ("", "."))
    if not path:
        raise _unsafe("is empty")
    if ".." in path.split("/"):
        raise _unsafe("climbs out of the archive with '..'")
    if not name.isascii() and ".." in unicodedata.normalize("NFKC", path).translate(_SLASHES).split("/"):
        raise _unsafe("looks like one that climbs out of the archive")
    if "%" in path:
        _check_decoded(path)
    return path


def relative(name: str) -> str:
    """A path as a user wrote it in a table: in `safe_path`'s form, but never refused. It is only ever looked up among
    known paths, so one that climbs out simply does not exist there."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def is_litter(path: str) -> bool:
    """What operating systems leave behind: dotfiles, `__MACOSX`, `Thumbs.db`, `desktop.ini`."""
    parts = path.split("/")
    return any(part.startswith(".") or part == "__MACOSX" for part in parts) or parts[-1].lower() in _LITTER


def _check_decoded(path: str) -> None:
    # "100%.jpg" is a fine name; "%2e%2e" is only ever an attack, also when encoded twice.
    decoded = path
    for _ in range(3):
        decoded, before = unquote(decoded), decoded
        if decoded == before:
            return
        hidden = decoded.count("/") != path.count("/") or "\\" in decoded or not decoded.isprintable()
        if hidden or {".", ".."} & set(decoded.split("/")):
            raise _unsafe("hides a path behind percent signs")


def _unsafe(reason: str) -> InvalidInput:
    return InvalidInput(f"The name {reason}. Rename the file and pack it again.", code="unsafe_path")
