"""The reader takes and refuses what the standard library's does."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import EllipsisType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.datasets.limits import MIB, BadArchive, Limits, Meter
from shared.datasets.zip_reader import entries
from shared.errors import InvalidInput

Content = bytes | None | EllipsisType  # None: damaged
SIGNATURES = (b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04", b"PK\x06\x06", b"PK\x06\x07")


def by_the_standard_library(path: Path) -> list[tuple[str, int, Content]] | None:
    """Name, claimed size and content of each entry; None where the archive as a whole is refused."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None
    found: list[tuple[str, int, Content]] = []
    with archive:
        for info in archive.infolist():
            if hasattr(info, "_end_offset"):  # newer Pythons refuse entries that overlap; here they only count
                info._end_offset = None
            name = info.orig_filename
            if not info.flag_bits & 0x800:
                with suppress(UnicodeError):
                    name = name.encode("cp437").decode()
            found.append((name, info.file_size, content(partial(archive.read, info))))
    return found


def by_ours(path: Path) -> list[tuple[str, int, Content]] | None:
    """The content is `...` where it is never asked for."""
    try:
        return [
            (entry.name, entry.size, content(partial(entry.read, 16 * MIB)) if entry.kind == "file" else ...)
            for entry in entries(path, Meter(Limits(max_ratio=1e9), path.stat().st_size))
        ]
    except BadArchive:
        return None


def content(read: Callable[[], bytes]) -> bytes | None:
    try:
        return read()
    except (InvalidInput, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, ValueError, OSError):
        return None


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    out = io.BytesIO(draw(st.sampled_from([b"", b"PK\x03\x04 something in front"])))
    out.seek(0, io.SEEK_END)
    with zipfile.ZipFile(out, "a") as archive:
        for name in draw(st.lists(st.text("ab/é日", min_size=1, max_size=6), max_size=4, unique=True)):
            info = zipfile.ZipInfo(name)
            info.compress_type = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            info.extra = draw(st.sampled_from([b"", struct.pack("<2H", 9, 4) + b"abcd"]))
            info.comment = draw(st.binary(max_size=5))
            with archive.open(info, "w", force_zip64=draw(st.booleans())) as file:
                file.write(draw(st.binary(max_size=50)) * draw(st.sampled_from([1, 9_000])))
        archive.comment = draw(st.sampled_from([b"", b"about this"]))
    data = out.getvalue()
    if draw(st.booleans()) and not archive.comment:  # the end again, for 64 bits
        start = data.rindex(b"PK\x05\x06")
        count, size, offset = struct.unpack_from("<H2L", data, start + 10)
        long = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        data = data[:start] + long + struct.pack("<4sLQL", b"PK\x06\x07", 0, start, 1) + data[start:]
    return data


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A byte or two changed, most of them in the headers and the directory; or the end cut off."""
    data = bytearray(draw(archives()))
    if draw(st.integers(0, 4)) == 0:
        return bytes(data[: draw(st.integers(0, len(data)))])
    for _ in range(draw(st.integers(1, 2))):
        headers = [0] + [at for signature in SIGNATURES if (at := data.rfind(signature)) >= 0]
        at = draw(st.sampled_from(headers)) + draw(st.integers(0, 56))
        if at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=archives() | damaged())
def test_it_agrees_with_the_standard_library(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "upload"
    path.write_bytes(data)
    expected, found = by_the_standard_library(path), by_ours(path)
    if expected is None or found is None:
        assert found == expected
        return
    asked = [entry if found[number][2] is not ... else (*entry[:2], ...) for number, entry in enumerate(expected)]
    assert found == asked


def test_a_prefix_shifts_every_offset_and_zip64_numbers_are_read(tmp_path: Path) -> None:
    out = io.BytesIO(b"#!/bin/sh\n" * 10)
    out.seek(0, io.SEEK_END)
    with zipfile.ZipFile(out, "a") as archive, archive.open("a.jpg", "w", force_zip64=True) as file:
        file.write(b"x" * 100)
    path = tmp_path / "upload"
    path.write_bytes(out.getvalue())
    assert by_ours(path) == [("a.jpg", 100, b"x" * 100)]


@pytest.mark.parametrize("entries_claimed", [0, 3, 65_535])
def test_the_number_of_entries_in_the_end_record_is_not_believed(tmp_path: Path, entries_claimed: int) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("b", b"2")
    data = bytearray(out.getvalue())
    data[-12:-10] = struct.pack("<H", entries_claimed)
    path = tmp_path / "upload"
    path.write_bytes(bytes(data))
    assert by_ours(path) == [("a", 1, b"1"), ("b", 1, b"2")]
