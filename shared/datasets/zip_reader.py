"""Zip entries, one by one as they stand in the archive's directory (PKWARE's APPNOTE.TXT, 4.3 to 4.5).

Not through `zipfile`, which makes an object of every entry before it gives out the first, nearly a kilobyte of memory
each. What that accepts and refuses is the same here.
"""

import stat
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import BinaryIO, Final, NamedTuple

from shared.datasets.entries import Entry, Kind, decoded
from shared.datasets.limits import MIB, BadArchive, Meter, corrupt, truncated
from shared.errors import InvalidInput

_MAX_DIRECTORY: Final = 128 * MIB  # a million entries with names of 50 characters
_MAX_COMMENT: Final = 1 << 16
_PIECE: Final = 256 * 1024
# x: bytes that say nothing of use. At the end of the file:
_END: Final = Struct("<4s8x2LH")  # signature; directory: size, offset; length of the comment that follows
_END64: Final = Struct("<4s36x2Q")  # signature; directory: size, offset
_LOCATOR: Final = Struct("<4sL8xL")  # signature; the disk with the record above, number of disks
# For each file:
_RECORD: Final = Struct("<4sx2Bx2H4x3L3H4x2L")  # in the directory: as _records takes it apart
_LOCAL: Final = Struct("<4s2xH18x2H")  # before the data: signature, flags, lengths of name and extra fields
_EXTRA: Final = Struct("<2H")  # identifier, length
_LONG: Final = Struct("<Q")
_ZIP64: Final = 1  # the extra field with what does not fit into 32 bits
_ELSEWHERE: Final = 0xFFFFFFFF  # stands where that field has the number
_NEWEST: Final = 63  # version 6.3 of the format
_UNIX: Final = 3
_STORED, _DEFLATED, _AES = 0, 8, 99
_ENCRYPTED: Final = 0x41  # bit 0: encrypted, bit 6: strong encryption
_PATCHED: Final = 0x20
_UTF8: Final = 0x800


class _Record(NamedTuple):
    """`start`: where the local header begins. Sizes and positions in bytes, as claimed."""

    name: str
    system: int
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    attributes: int
    start: int


def entries(path: Path, meter: Meter) -> Iterator[Entry]:
    """Raises BadArchive where the directory itself is unusable."""
    archive_size = path.stat().st_size
    with path.open("rb") as directory, path.open("rb") as content:
        try:
            for record in _records(directory, archive_size):
                meter.entries(1)
                name = record.name if record.flags & _UTF8 else decoded(record.name, "cp437")
                read = partial(_read, content, record, archive_size, meter)
                yield Entry(name, _kind(record), record.size, read)
        except (StructError, ValueError) as error:
            raise corrupt("its directory") from error


def _records(file: BinaryIO, archive_size: int) -> Iterator[_Record]:
    """Raises ValueError or StructError for what is no directory, besides BadArchive."""
    start, size, shift = _directory(file, archive_size)
    if size > _MAX_DIRECTORY:
        raise BadArchive("The archive's directory is too long. Split the data set.", code="too_many_entries")
    file.seek(start)
    while size > 0:
        fields = _RECORD.unpack(file.read(min(size, _RECORD.size)))
        signature, system, version, flags, method, crc, packed, unpacked, *lengths, attributes, at = fields
        if signature != b"PK\x01\x02" or version > _NEWEST:
            raise ValueError
        rest = file.read(min(size - _RECORD.size, sum(lengths)))
        size -= _RECORD.size + sum(lengths)
        name_end, extra_end = lengths[0], lengths[0] + lengths[1]
        unpacked, packed, at = _long_numbers(rest[name_end:extra_end], [unpacked, packed, at])
        name = _name(rest[:name_end], flags)
        yield _Record(name, system, flags, method, crc, packed, unpacked, attributes, at + shift)


def _directory(file: BinaryIO, archive_size: int) -> tuple[int, int, int]:
    """Position and size, and how far every offset is off: there may be something in front of the archive."""
    tail_at = max(0, archive_size - _END.size)
    file.seek(tail_at)
    tail = file.read()
    end = 0 if tail.startswith(b"PK\x05\x06") and tail.endswith(b"\0\0") else -1
    if end < 0:
        tail_at = max(0, tail_at - _MAX_COMMENT)
        file.seek(tail_at)
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < _END.size:
        raise truncated()
    _, size, offset, _ = _END.unpack_from(tail, end)
    directory_end = end + tail_at
    if directory_end >= _LOCATOR.size:
        file.seek(directory_end - _LOCATOR.size)
        signature, disk, disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        at = directory_end - _LOCATOR.size - _END64.size
        if signature == b"PK\x06\x07" and at >= 0:
            file.seek(at)
            signature, long_size, long_offset = _END64.unpack(file.read(_END64.size))
            if disk or disks > 1:
                raise ValueError
            if signature == b"PK\x06\x06":
                size, offset, directory_end = long_size, long_offset, at
    start = directory_end - size
    if start < 0:
        raise ValueError
    return start, size, start - offset


def _long_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """`numbers`, those that did not fit taken from the extra fields."""
    while len(extra) >= _EXTRA.size:
        identifier, length = _EXTRA.unpack_from(extra)
        field, extra = extra[_EXTRA.size : _EXTRA.size + length], extra[_EXTRA.size + length :]
        if len(field) < length:
            raise ValueError
        for index, number in enumerate(numbers):
            if identifier == _ZIP64 and number == _ELSEWHERE:
                numbers[index] = _LONG.unpack_from(field)[0]
                field = field[_LONG.size :]
    return numbers


def _name(raw: bytes, flags: int) -> str:
    return raw.decode("utf-8" if flags & _UTF8 or raw.isascii() else "cp437")


def _kind(record: _Record) -> Kind:
    mode = record.attributes >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if record.name.endswith("/") or stat.S_ISDIR(mode):
        return "directory"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) and record.system == _UNIX:  # only there the bits mean this
        return "special"
    if record.flags & _ENCRYPTED or record.method == _AES:
        return "encrypted"
    return "file" if record.method in (_STORED, _DEFLATED) else "unsupported"


def _read(file: BinaryIO, record: _Record, archive_size: int, meter: Meter, limit: int) -> bytes:
    meter.unpacked(min(record.size, limit))  # no more is inflated, whatever the data holds
    try:
        if not 0 <= record.start < archive_size:
            raise ValueError
        return _content(file, record, min(record.size, limit + 1))
    except (StructError, EOFError, zlib.error, ValueError) as error:
        raise InvalidInput("The file is damaged inside the archive; pack it again.", code="corrupt_file") from error


def _content(file: BinaryIO, record: _Record, wanted: int) -> bytes:
    file.seek(record.start)
    signature, flags, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    if signature != b"PK\x03\x04" or _name(file.read(name_length), flags) != record.name or record.flags & _PATCHED:
        raise ValueError
    file.seek(extra_length, 1)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if record.method == _DEFLATED else None
    parts: list[bytes] = []
    missing, packed = wanted, record.packed
    while missing and packed and not (inflater and inflater.eof):
        piece = file.read(min(packed, _PIECE, missing if inflater is None else _PIECE))
        if not piece:
            raise EOFError
        packed -= len(piece)
        parts.append(inflater.decompress(piece, missing) if inflater else piece)
        missing -= len(parts[-1])
    data = b"".join(parts)
    if (missing or wanted == record.size) and zlib.crc32(data) != record.crc:
        raise ValueError
    return data
