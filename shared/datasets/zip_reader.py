"""Zip entries one at a time, straight from the central directory (APPNOTE.TXT 6.3).

The standard library's ZipFile builds an object per entry before it gives out the first: a hostile directory of a few
hundred megabytes takes gigabytes. This reader holds one entry, whatever the archive's size.
"""

import stat
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, Final

from shared.datasets.entries import Entry, Kind
from shared.datasets.limits import Meter, corrupt, truncated
from shared.errors import InvalidInput

_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL: Final = struct.Struct("<4s2B4HL2L2H")
_SATURATED: Final = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED_FLAGS: Final = 0x41  # bit 0: encrypted, bit 6: strong encryption
_UTF8_FLAG: Final = 0x800


def entries(file: BinaryIO, length: int, meter: Meter) -> Iterator[Entry]:
    """Raises BadArchive where the directory itself is unusable."""
    offset, size = _directory(file, length)
    end = offset + size
    if end > length:
        raise truncated()
    while offset < end:
        file.seek(offset)  # reading an entry's content moves the file
        header = file.read(_CENTRAL.size)
        if len(header) < _CENTRAL.size or header[:4] != b"PK\x01\x02":
            raise corrupt("its directory")
        fields = _CENTRAL.unpack(header)
        made_by, flags, method = fields[2], fields[5], fields[6]
        checksum, packed, unpacked = fields[9], fields[10], fields[11]
        name_size, extra_size, comment_size = fields[12:15]
        attributes, start = fields[17], fields[18]
        name = file.read(name_size)
        extra = file.read(extra_size)
        if len(extra) < extra_size:
            raise corrupt("its directory")
        unpacked, packed, start = _zip64(extra, unpacked, packed, start)
        meter.entry()
        kind = _kind(name, made_by, attributes, flags, method)
        reader = partial(_read, file, length, start, packed, unpacked, checksum, method, meter)
        yield Entry(_decode(name, flags), kind, unpacked, reader)
        offset += _CENTRAL.size + name_size + extra_size + comment_size


def _directory(file: BinaryIO, length: int) -> tuple[int, int]:
    """Offset and size of the central directory."""
    tail_at = max(0, length - _END.size - 0xFFFF)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise truncated()
    _, disk, _, _, _, size, offset, _ = _END.unpack_from(tail, at)
    locator_at = tail_at + at - _LOCATOR64.size
    if locator_at >= 0:
        file.seek(locator_at)
        magic, _, end64_at, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
        if magic == b"PK\x06\x07":
            file.seek(min(end64_at, length))
            record = file.read(_END64.size)
            if len(record) < _END64.size or record[:4] != b"PK\x06\x06":
                raise corrupt("its 64-bit directory record")
            fields = _END64.unpack(record)
            disk, size, offset = fields[4], fields[8], fields[9]
    if disk:
        raise corrupt("it is one part of several; join the parts")
    return offset, size


def _zip64(extra: bytes, unpacked: int, packed: int, start: int) -> tuple[int, int, int]:
    """64-bit values replace, in this order, exactly those fields that are saturated."""
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            values = list(struct.unpack_from(f"<{min(size, len(extra) - at - 4) // 8}Q", extra, at + 4))
            wide = [values.pop(0) if v == _SATURATED and values else v for v in (unpacked, packed, start)]
            return wide[0], wide[1], wide[2]
        at += 4 + size
    return unpacked, packed, start


def _kind(name: bytes, made_by: int, attributes: int, flags: int, method: int) -> Kind:
    mode = attributes >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if name.endswith(b"/") or stat.S_ISDIR(mode):
        return "directory"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) and made_by == 3:  # 3: Unix, only there the bits mean this
        return "special"
    if flags & _ENCRYPTED_FLAGS or method == 99:
        return "encrypted"
    return "file" if method in (_STORED, _DEFLATED) else "unsupported"


def _decode(name: bytes, flags: int) -> str:
    # Many packers write UTF-8 without saying so; what is not valid UTF-8 is the format's original code page.
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("utf-8" if flags & _UTF8_FLAG else "cp437", "replace")


def _read(
    file: BinaryIO,
    length: int,
    start: int,
    packed: int,
    unpacked: int,
    checksum: int,
    method: int,
    meter: Meter,
    limit: int,
) -> bytes:
    if start + _LOCAL.size > length:
        raise _damaged()
    file.seek(start)
    local = _LOCAL.unpack(file.read(_LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise _damaged()
    start += _LOCAL.size + local[-2] + local[-1]
    if start + packed > length:
        raise _damaged()
    file.seek(start)
    # Deflate adds at most 5 bytes per 16 KiB block, so more input than this cannot be a file within the limit.
    raw = file.read(min(packed, limit + limit // 1024 + 1024))
    if method == _STORED:
        data, whole = raw[: limit + 1], True
    else:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(raw, limit + 1)
        except zlib.error as error:
            raise _damaged() from error
        whole = inflater.eof
    meter.unpacked(len(data))
    if len(data) > limit:
        return data
    if not whole or len(data) != unpacked or zlib.crc32(data) != checksum:
        raise _damaged()
    return data


def _damaged() -> InvalidInput:
    return InvalidInput("The file is damaged inside the archive; pack it again.", code="corrupt_file")
