"""Tar entries in one forward pass: POSIX ustar and pax, GNU long names, old v7. Plain, gzip, bzip2 or xz.

The standard library's tarfile believes the sizes of its extended headers (a bomb there fills the memory before a byte
of content is read) and keeps every member it has seen. This reader holds one entry.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, Final, Protocol

from shared.datasets.entries import Entry, Kind
from shared.datasets.limits import MIB, Meter, corrupt, truncated

BLOCK: Final = 512
_CHUNK: Final = 256 * 1024
_MAX_EXTENDED: Final = MIB  # a pax header or long name; real ones have a few hundred bytes
_XZ_MEMORY: Final = 128 * MIB  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
_TYPES: Final[dict[bytes, Kind]] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "directory", b"1": "link", b"2": "link",
    b"3": "special", b"4": "special", b"6": "special",
}  # fmt: skip


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def entries(file: BinaryIO, compression: str, meter: Meter) -> Iterator[Entry]:
    """`compression`: "", "gz", "bz2" or "xz". Raises BadArchive: a tar has nothing to go on with after damage."""
    file.seek(0)
    stream = _Stream(_decompressed(file, compression), meter)
    name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = stream.exactly(BLOCK)
        if header == b"\0" * BLOCK:
            stream.drain()  # to the compressed stream's own checksum
            return
        if not valid_header(header):
            raise corrupt("a header's checksum is wrong")
        meter.entry()
        size = _number(header[124:136])
        flag = header[156:157]
        if flag in b"xXgLK":
            if size > _MAX_EXTENDED:
                raise corrupt("an extended header is absurdly long")
            content = stream.exactly(size)
            stream.skip(-size % BLOCK)
            if flag in b"xX":
                pax = _pax(content)
            elif flag == b"L":
                name = _text(content.split(b"\0", 1)[0])
            continue
        size = _pax_size(pax, size)
        kind = _TYPES.get(flag, "unsupported")
        if flag == b"S" and header[482]:
            while stream.exactly(BLOCK)[504]:
                pass
        if any(key.startswith("GNU.sparse") for key in pax):
            kind = "unsupported"
        name = pax.get("path") or name or _ustar_name(header)
        if kind == "file" and name.endswith("/"):
            kind = "directory"
        # As every tar does: links, devices and folders have no content, whatever their size field says.
        if kind not in ("file", "unsupported"):
            size = 0
        before = stream.position
        yield Entry(name, kind, size, partial(stream.content, before, size))
        stream.skip(before + size + -size % BLOCK - stream.position)
        name, pax = None, {}


def valid_header(header: bytes) -> bool:
    """Whether these 512 bytes are a tar header, or the zeros that end an archive."""
    if len(header) < BLOCK:
        return False
    if header == b"\0" * BLOCK:
        return True
    try:
        expected = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    return expected == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def first_block(file: BinaryIO, compression: str) -> bytes:
    """The first 512 bytes inside, or fewer where there are none. Never raises for damaged data."""
    file.seek(0)
    source, block = _decompressed(file, compression), b""
    try:
        while len(block) < BLOCK and (more := source.read(BLOCK - len(block))):
            block += more
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError):
        return block
    return block


class _Stream:
    """A metered forward reader that turns every decompressor's complaint into BadArchive."""

    def __init__(self, source: _Readable, meter: Meter) -> None:
        self._source = source
        self._meter = meter
        self.position = 0

    def exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._some(min(size, _CHUNK))
            if not part:
                raise truncated()
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def content(self, start: int, size: int, limit: int) -> bytes:
        if self.position != start:
            raise RuntimeError("a tar member can only be read once, and before the next one")
        return self.exactly(min(size, limit + 1))

    def skip(self, size: int) -> None:
        while size:
            part = self._some(min(size, _CHUNK))
            if not part:
                raise truncated()
            size -= len(part)

    def drain(self) -> None:
        while self._some(_CHUNK):
            pass

    def _some(self, size: int) -> bytes:
        try:
            part = self._source.read(size)
        except EOFError as error:
            raise truncated() from error
        except (zlib.error, lzma.LZMAError, ValueError) as error:
            raise corrupt("its compressed data") from error
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the archive's
                raise
            raise corrupt("its compressed data") from error
        self._meter.unpacked(len(part))
        self.position += len(part)
        return part


class _Xz:
    """lzma.LZMAFile with a memory limit, which that class cannot be given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None

    def read(self, size: int, /) -> bytes:
        while True:
            fresh = b""
            if self._decoder is None or self._decoder.eof:
                fresh = self._next_stream()
                if not fresh:
                    return b""
            elif self._decoder.needs_input and not (fresh := self._file.read(_CHUNK)):
                raise EOFError
            assert self._decoder is not None
            if part := self._decoder.decompress(fresh, size):
                return part

    def _next_stream(self) -> bytes:
        """The beginning of the next stream (xz files may be concatenated, with zeros between); b"" at the end."""
        rest = self._decoder.unused_data if self._decoder else b""
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._file.read(_CHUNK)):
                return b""
        self._decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return rest


def _decompressed(file: BinaryIO, compression: str) -> _Readable:
    if compression == "gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == "bz2":
        return bz2.BZ2File(file, "rb")
    return _Xz(file) if compression == "xz" else file


def _number(field: bytes) -> int:
    """Octal digits, or (first bit set) a big-endian number as GNU tar writes beyond 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise corrupt("a size is not a number")
    return value


def _pax_size(pax: dict[str, str], size: int) -> int:
    if "size" not in pax:
        return size
    if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) < 20):
        raise corrupt("a size is not a number")
    return int(pax["size"])


def _pax(content: bytes) -> dict[str, str]:
    """Records of the form `length key=value newline`, the length counting itself."""
    values: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at : at + 1] != b"\0":
        space = content.find(b" ", at, at + 8)
        if space < 0 or not content[at:space].isdigit():
            raise corrupt("an extended header")
        end = at + int(content[at:space])
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(content) or not equals:
            raise corrupt("an extended header")
        values[_text(key)] = _text(value)
        at = end
    return values


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
