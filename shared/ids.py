"""Identifiers: a prefix that says what the thing is, then a ULID, so that ids sort by creation time."""

from ulid import ULID


def new_id(prefix: str) -> str:
    """`new_id("ft")` -> `ft_01jd...` (26 lower-case base32 characters: 48 bits of milliseconds, 80 random bits)."""
    return f"{prefix}_{str(ULID()).lower()}"
