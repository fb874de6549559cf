"""Tar entries in one forward pass through `tarfile`: plain, gzip, bzip2 or xz.

`tarfile` believes the sizes of extended headers and keeps all it has seen. So it reads through a guard, which lets it
have little between two files, and forgets every entry at once.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from shared.datasets.entries import Entry, Kind, decoded
from shared.datasets.limits import MIB, Meter, corrupt, truncated

BLOCK: Final = tarfile.BLOCKSIZE
_CHUNK: Final = 256 * 1024
_MAX_EXTENDED: Final = MIB  # pax headers and long names of one entry; real ones have a few hundred bytes
_LEAST: Final = 64 * 1024  # what a read counts for at least, so that headers cannot be nested more than 16 deep
_XZ_MEMORY: Final = 128 * MIB  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
# Before Python 3.11.10 and 3.12.6 tarfile takes quadratic time on many digits in a pax header (CVE-2024-6232).
_TO_ZERO: Final = bytes.maketrans(b"123456789", b"000000000")
_ENDLESS: Final = b"0" * 256
_DAMAGE: Final = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
_KINDS: Final[dict[bytes, Kind]] = {
    tarfile.REGTYPE: "file", tarfile.AREGTYPE: "file", tarfile.CONTTYPE: "file", tarfile.DIRTYPE: "directory",
    tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "special", tarfile.BLKTYPE: "special", tarfile.FIFOTYPE: "special",
}  # fmt: skip


def entries(path: Path, compression: str, meter: Meter) -> Iterator[Entry]:
    """`compression`: "", "gz", "bz2" or "xz". Raises BadArchive: a tar has nothing to go on with after damage."""
    with path.open("rb") as file:
        source = _Source(_pieces(file, compression, _CHUNK), meter)
        try:
            archive = tarfile.TarFile(fileobj=source, encoding="latin-1")
            while info := archive.next():
                archive.members, archive.pax_headers = [], {}  # type: ignore[attr-defined]
                source.allowance = _MAX_EXTENDED
                meter.entries(1)
                kind = "unsupported" if info.issparse() else _KINDS.get(info.type, "unsupported")
                if kind == "file" and info.name.endswith("/"):
                    kind = "directory"
                read = partial(source.content, source.tell(), info.size)
                yield Entry(decoded(info.name, "latin-1"), kind, info.size, read)
        except (tarfile.TarError, ValueError) as error:
            raise corrupt("a header") from error
        if any(source.latest):  # tarfile takes a bad header for the end
            raise corrupt("a header's checksum is wrong")
        while source.piece():  # to the compressed stream's own checksum
            pass


def valid_header(header: bytes) -> bool:
    """Whether these 512 bytes are a tar header, or the zeros that end an archive."""
    try:
        return bool(tarfile.TarInfo.frombuf(header, "latin-1", "strict"))
    except tarfile.HeaderError:
        return header == b"\0" * BLOCK


def first_block(file: BinaryIO, compression: str) -> bytes:
    """The first 512 bytes inside, or fewer where there are none. Never raises for damaged data."""
    file.seek(0)
    try:
        return next(_pieces(file, compression, BLOCK), b"")
    except _DAMAGE:
        return b""


class _Source(io.RawIOBase):
    """The unpacked stream as tarfile sees it: forward only, metered, and never short. `allowance` is what tarfile may
    read before the next file, `latest` what it has read last. Raises BadArchive for whatever is wrong."""

    def __init__(self, pieces: Iterator[bytes], meter: Meter) -> None:
        self._pieces, self._meter = pieces, meter
        self._rest, self._position = memoryview(b""), 0
        self.allowance, self.latest = _MAX_EXTENDED, b""

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        for _ in self._parts(offset - self._position):
            pass
        return offset

    def read(self, size: int = -1, /) -> bytes:
        self.allowance -= max(size, _LEAST)
        if self.allowance < 0:
            raise corrupt("an extended header is absurdly long")
        self.latest = b"".join(self._parts(size))
        if size > BLOCK and _ENDLESS in self.latest.translate(_TO_ZERO):
            raise corrupt("an extended header")
        return self.latest

    def content(self, start: int, size: int, limit: int) -> bytes:
        if self._position != start:
            raise RuntimeError("a tar member can only be read once, and before the next one")
        return b"".join(self._parts(min(size, limit + 1)))

    def piece(self) -> bytes:
        try:
            piece = next(self._pieces, b"")
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the archive's
                raise
            raise (truncated() if isinstance(error, EOFError) else corrupt("its compressed data")) from error
        self._meter.unpacked(len(piece))
        return piece

    def _parts(self, size: int) -> Iterator[memoryview]:
        if size < 0:
            raise corrupt("a size is not a number")
        while size:
            self._rest = self._rest or memoryview(self.piece())
            if not self._rest:
                raise truncated()
            part, self._rest = self._rest[:size], self._rest[size:]
            self._position += len(part)
            size -= len(part)
            yield part


def _pieces(file: BinaryIO, compression: str, size: int) -> Iterator[bytes]:
    if compression == "xz":
        return _xz_pieces(file, size)
    stream: BinaryIO | gzip.GzipFile | bz2.BZ2File = file
    if compression:
        # Told to read: it would take the mode of `file`, and an upload's temporary file is open for writing too.
        stream = gzip.GzipFile(fileobj=file, mode="rb") if compression == "gz" else bz2.BZ2File(file)
    return iter(lambda: stream.read(size), b"")


def _xz_pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """As lzma.LZMAFile reads, but with a memory limit, which that class cannot be given."""
    packed = b""
    while packed := packed.lstrip(b"\0") or file.read(_CHUNK).lstrip(b"\0"):
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        while not decoder.eof:
            if decoder.needs_input and not (packed := packed or file.read(_CHUNK)):
                raise EOFError
            if piece := decoder.decompress(packed, size):
                yield piece
            packed = b""
        packed = decoder.unused_data
