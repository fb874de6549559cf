"""Archives that no packer writes, byte by byte, and what became of them."""

import io
import struct
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from shared.datasets.archive import open_archive
from shared.datasets.limits import BadArchive, Limits
from shared.errors import InvalidInput

GOOD = ("cat/good.jpg", b"good")
UTF8 = 0x800


@dataclass(frozen=True)
class Zipped:
    """One entry. What is not None is what its header says, whatever is true; `local_name` stands before the data."""

    name: bytes
    data: bytes = b"evil"
    flags: int = UTF8
    method: int = 8
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    offset: int | None = None
    mode: int = 0o100644
    extra: bytes = b""
    local_name: bytes | None = None
    local_method: int | None = None
    local_size: int | None = None


def zipped(*entries: Zipped, prefix: bytes = b"", comment: bytes = b"", count: int | None = None) -> bytes:
    """A zip of these, in order; then the directory, which may claim another number of entries."""
    out, directory = bytearray(prefix), bytearray()
    for each in entries:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = deflate.compress(each.data) + deflate.flush() if each.method == 8 else each.data
        start = len(out) if each.offset is None else each.offset
        crc = zlib.crc32(each.data) if each.crc is None else each.crc
        size = len(each.data) if each.size is None else each.size
        packed = len(body) if each.packed is None else each.packed
        if each.offset is None:
            name = each.name if each.local_name is None else each.local_name
            method = each.method if each.local_method is None else each.local_method
            told = size if each.local_size is None else each.local_size
            sizes = (crc, packed & 0xFFFFFFFF, told & 0xFFFFFFFF)
            head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, each.flags, method, 0, 0x21, *sizes, len(name), 0)
            out += head + name + body
        directory += struct.pack(
            "<4s2B5H3L5H2L", b"PK\x01\x02", 20, 3, 20, each.flags, each.method, 0, 0x21, crc, packed & 0xFFFFFFFF,
            size & 0xFFFFFFFF, len(each.name), len(each.extra), 0, 0, 0, each.mode << 16, start & 0xFFFFFFFF,
        ) + each.name + each.extra  # fmt: skip
    number = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, number, number, len(directory), len(out), len(comment))
    return bytes(out + directory + end + comment)


def tarred(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(
    name: str, data: bytes = b"evil", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b"" if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE) else data


def header(name: str, kind: bytes, size: int) -> bytes:
    """A tar header alone, whatever follows it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def block(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 512)


@dataclass
class Outcome:
    """`files` by path, `refused` how many of each code while reading names and contents, `broken` the code where the
    archive as a whole was given up."""

    files: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    broken: str | None = None


def outcome(folder: Path, data: bytes, limits: Limits | None = None) -> Outcome:
    """What intake makes of it. Nothing but InvalidInput may be raised, both passes must agree, and nothing may be
    written anywhere."""
    path = folder / "upload"
    path.write_bytes(data)
    before = sorted(folder.rglob("*"))
    found = Outcome()
    try:
        archive = open_archive(path, limits)
        names = list(archive.names())
        found.refused = dict(archive.report.refused)
        passed = []
        for each in archive.members():
            passed.append(each.path)
            try:
                found.files[each.path] = each.read()
            except BadArchive:
                raise
            except InvalidInput as refused:
                found.refused[refused.code] = found.refused.get(refused.code, 0) + 1
        assert passed == names
    except BadArchive as broken:
        found.broken = broken.code
    assert sorted(folder.rglob("*")) == before
    return found
