"""What an uploaded archive may cost, measured on what is unpacked of it; a header's claim can never make that less."""

from dataclasses import dataclass
from typing import Final

from shared.errors import InvalidInput

MIB: Final = 1024 * 1024
# Even an honest archive of a few flat drawings packs 500:1, so the ratio says nothing about small ones.
_RATIO_COUNTS_FROM: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes. `max_ratio` is unpacked / packed over the whole archive."""

    max_entries: int = 1_000_000
    max_member_bytes: int = 64 * MIB
    max_total_bytes: int = 100 * 1024 * MIB
    max_ratio: float = 200.0


class BadArchive(InvalidInput):
    """The archive as a whole cannot be used; any other InvalidInput while reading concerns one file."""

    default_code = "corrupt_archive"


class Meter:
    """Counts one pass over one archive and stops it at the limits."""

    def __init__(self, limits: Limits, packed_bytes: int) -> None:
        self._limits = limits
        self._bomb_at = max(_RATIO_COUNTS_FROM, int(limits.max_ratio * packed_bytes))
        self._entries = 0
        self._unpacked = 0

    def entries(self, count: int) -> None:
        self._entries += count
        if self._entries > self._limits.max_entries:
            raise BadArchive(
                f"The archive has more than {self._limits.max_entries:,} entries. Split the data set.",
                code="too_many_entries",
            )

    def unpacked(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > self._limits.max_total_bytes:
            raise BadArchive(
                f"The archive unpacks to more than {self._limits.max_total_bytes // MIB:,} MiB. Split the data set.",
                code="archive_too_large",
            )
        if self._unpacked > self._bomb_at:
            raise BadArchive(
                f"The archive unpacks to more than {self._limits.max_ratio:g} times its size, as only archive bombs "
                "do. Pack the pictures as JPEG, PNG or WebP.",
                code="archive_bomb",
            )


def truncated() -> BadArchive:
    return BadArchive("The archive ends too early: the upload was cut off. Send it again.", code="truncated_archive")


def corrupt(what: str) -> BadArchive:
    return BadArchive(f"The archive is damaged ({what}). Pack it again.", code="corrupt_archive")
