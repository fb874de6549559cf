"""Zip entries through `zipfile`. It makes an object of every entry before it gives out the first, nearly a kilobyte of
memory each, so their number is limited before that."""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Final

from shared.datasets.entries import Entry, Kind, decoded
from shared.datasets.limits import MIB, BadArchive, Meter, corrupt, truncated
from shared.errors import InvalidInput

_MAX_DIRECTORY: Final = 128 * MIB  # a million entries with names of 50 characters
_RECORD: Final = b"PK\x01\x02"  # how every entry's record in the directory begins
_ENCRYPTED: Final = 0x41  # bit 0: encrypted, bit 6: strong encryption
_UTF8: Final = 0x800


def entries(path: Path, meter: Meter) -> Iterator[Entry]:
    """Raises BadArchive where the directory itself is unusable."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as raw, _Guarded(raw) as file:
        try:
            if not zipfile.is_zipfile(file):
                raise truncated()
            file.meter = meter
            archive = zipfile.ZipFile(file)
            file.meter = None
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise corrupt("its directory") from error
        for info in archive.infolist():
            name = info.orig_filename  # `filename` ends at a NUL
            if not info.flag_bits & _UTF8:
                name = decoded(name, "cp437")
            yield Entry(name, _kind(info), info.file_size, partial(_read, archive, info, size, meter))


class _Guarded(BufferedReader):
    """While it has a meter, counts the entries in what zipfile reads of the directory, and stops it at the limits."""

    meter: Meter | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if not self.meter or not size or size < 0:  # without a size zipfile only looks for the end record
            return super().read(size)
        if size > _MAX_DIRECTORY:
            raise BadArchive("The archive's directory is too long. Split the data set.", code="too_many_entries")
        data = super().read(size)
        self.meter.entries(data.count(_RECORD))
        return data


def _kind(info: zipfile.ZipInfo) -> Kind:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "link"
    if info.orig_filename.endswith("/") or stat.S_ISDIR(mode):
        return "directory"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) and info.create_system == 3:  # 3: Unix, only there the bits mean this
        return "special"
    if info.flag_bits & _ENCRYPTED or info.compress_type == 99:
        return "encrypted"
    return "file" if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else "unsupported"


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, archive_size: int, meter: Meter, limit: int) -> bytes:
    wanted = min(info.file_size, limit) + 1
    meter.unpacked(wanted - 1)  # zipfile inflates no more, whatever the data holds
    try:
        if not 0 <= info.header_offset < archive_size:
            raise zipfile.BadZipFile("outside of the archive")
        with archive.open(info) as file:
            return file.read(wanted)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, ValueError) as error:
        raise InvalidInput("The file is damaged inside the archive; pack it again.", code="corrupt_file") from error
