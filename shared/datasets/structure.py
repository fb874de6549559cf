"""Pictures that are cheap to send and dear to read, refused before a decoder sees them.

Pillow reads what surrounds the pixels (segments, chunks, strips, comments, runs) in Python, and some of it at a cost
that grows with the square of its number: a megabyte of comments takes it a minute, and a zip packs that megabyte to a
kilobyte. Real files have some tens of such parts. Each check here is a walk that stops at its limit.
"""

import re
from collections.abc import Callable
from itertools import islice
from typing import Final

from shared.errors import InvalidInput

MAX_PARTS: Final = 65_536  # segments, chunks, strips: 0.3 s at most
_MAX_EXIF_SEGMENTS: Final = 16  # of 64 KiB; Pillow joins them one by one
# A progressive JPEG may repeat its scans, each of which costs a visit to every pixel. Real files have about 10.
_MAX_SCANS: Final = 256
_MAX_SCANNED_PIXELS: Final = 3_000_000_000  # pixels times scans: 3 s
_MAX_TAGS: Final = 1_024  # of a TIFF; real ones have about 20
_MAX_COMMENTS: Final = 256  # of a PPM
_PPM_NUMBERS: Final = rb"(?:(?:\s|#[^\r\n]*+[\r\n])++\d++){%d}\s"
_PPM_HEADER: Final = re.compile(rb"P(?:[14]" + _PPM_NUMBERS % 2 + rb"|[2356]" + _PPM_NUMBERS % 3 + rb")")
_PPM_HEADER_BYTES: Final = 4_096
_STRIPS, _TILES = 273, 324  # TIFF tags


def check_structure(format: str, data: bytes) -> None:
    """`format` as Pillow calls it. Raises InvalidInput (`unreadable_image`, `unsupported_format`)."""
    if (check := _CHECKS.get(format)) is not None:
        check(data)


def check_scans(data: bytes, pixels: int) -> None:
    """For a JPEG of so many pixels. Raises InvalidInput (`unreadable_image`)."""
    scans = data.count(b"\xff\xda")
    if scans > _MAX_SCANS or scans * pixels > _MAX_SCANNED_PIXELS:
        raise _absurd("scans")


def _jpeg(data: bytes) -> None:
    """The segments before the first scan: after it libjpeg reads, which is fast."""
    at, parts, exif = 2, 0, 0
    while at < len(data):
        parts += 1
        if data[at] != 0xFF:  # junk, skipped byte by byte
            found = data.find(b"\xff", at)
            parts, at = parts + (found - at), found
            if found < 0:
                return
        elif (marker := data[at + 1 : at + 2]) == b"\xda":
            return
        elif marker in (b"\xff", b"\0") or b"\xd0" <= marker <= b"\xd9":  # padding, or a marker without a length
            at += 1 if marker == b"\xff" else 2
        else:
            exif += marker == b"\xe1" and data.startswith(b"Exif", at + 4)
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if parts > MAX_PARTS or exif > _MAX_EXIF_SEGMENTS:
            raise _absurd("segments")


def _png(data: bytes) -> None:
    at = 8
    for _ in range(MAX_PARTS):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise _absurd("chunks")


def _tiff(data: bytes) -> None:
    """The first directory, plain or BigTIFF. Others are not read: a file with several pages is refused."""
    order: Final = "little" if data[:2] == b"II" else "big"
    big = 43 in data[2:4]
    word, head, entry = (8, 8, 20) if big else (4, 2, 12)

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    start = number(8 if big else 4, word)
    tags = number(start, head)
    if tags > _MAX_TAGS:
        raise _absurd("tags")
    for at in range(start + head, start + head + tags * entry, entry):
        if number(at, 2) in (_STRIPS, _TILES) and number(at + 4, word) > MAX_PARTS:
            raise _absurd("strips")


def _bmp(data: bytes) -> None:
    """Decoded by Pillow in Python, at 0.1 us for each pixel and 0.5 us for each run, however short."""
    if int.from_bytes(data[14:18], "little") >= 40 and int.from_bytes(data[30:34], "little") in (1, 2):
        raise InvalidInput("The BMP is run-length encoded; save it uncompressed or as PNG.", code="unsupported_format")


def _ppm(data: bytes) -> None:
    plain = data[1] in b"123"
    if not _PPM_HEADER.match(data[:_PPM_HEADER_BYTES]):
        raise InvalidInput("The picture is damaged and cannot be read; save it again.", code="unreadable_image")
    if plain and next(islice(re.finditer(b"#", data), _MAX_COMMENTS, None), None):
        raise _absurd("comments")


def _absurd(what: str) -> InvalidInput:
    return InvalidInput(f"The picture has an absurd number of {what}; save it again.", code="unreadable_image")


_CHECKS: Final[dict[str, Callable[[bytes], None]]] = {
    "JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "BMP": _bmp, "PPM": _ppm,
}  # fmt: skip
