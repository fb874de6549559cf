"""Uploaded archives, read in place: nothing is extracted, no name reaches the file system.

An archive is walked twice in flat memory: once for its names, from which the layout is decided, once for the files.
Names are kept on disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from shared.datasets import tar_reader, zip_reader
from shared.datasets.catalogue import Names
from shared.datasets.entries import WHY_REFUSED, Entry
from shared.datasets.limits import MIB, BadArchive, Limits, Meter
from shared.datasets.paths import is_litter, safe_path
from shared.datasets.report import Report
from shared.errors import InvalidInput

_ACCEPTED: Final = "zip, tar, tar.gz, tar.bz2 or tar.xz"
_COMPRESSIONS: Final = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_KNOWN_OTHERS: Final = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file. `size` in bytes is what the archive claims; `read()` counts for itself.

    `read()` is good until the next member is asked for. It raises InvalidInput (codes `file_too_large`,
    `corrupt_file`) where only this file is concerned, and its subclass BadArchive where no more can be read.
    """

    path: str
    size: int
    read: Callable[[], bytes]


class Archive:
    """`report` holds what was refused among the entries once `files()` has run; `kept` the files asked for by `keep`;
    `folders` those that have an entry of their own, so that empty ones can be told."""

    def __init__(self, path: Path, kind: str, limits: Limits, keep: Callable[[str], bool]) -> None:
        self.path = path
        self.kind = kind
        self.report = Report()
        self.kept: dict[str, bytes] = {}
        self.folders = Names()
        self._limits = limits
        self._keep = keep
        self._files: Names | None = None
        self._usable = bytearray()  # one byte per entry: is it a member?

    def files(self) -> Names:
        """Paths of all regular files that may be read, in archive order (normalised, each once). Raises BadArchive."""
        if self._files is None:
            files = Names()
            for entry in self._entries():
                path = self._usable_path(entry, files)
                self._usable.append(path is not None)
                if path is not None and self._keep(path):
                    self._keep_content(path, entry)
            self._files = files
        return self._files

    def names(self) -> list[str]:
        """`files()` in memory, for archives of few files."""
        return list(self.files())

    def members(self) -> Iterator[Member]:
        """The same files, with their content. Raises BadArchive."""
        self.files()
        for usable, entry in zip(self._usable, self._entries(), strict=False):
            if usable:
                path = safe_path(entry.name)
                yield Member(path, entry.size, partial(self._read, entry))

    def _usable_path(self, entry: Entry, files: Names) -> str | None:
        """The normalised path, now among `files`; None, with a word in the report, for what is not a readable file of
        its own."""
        if entry.kind == "directory" and not entry.name.strip("./"):
            return None  # the archive's own root
        try:
            path = safe_path(entry.name)
        except InvalidInput as refusal:
            self.report.refuse(entry.name, refusal.code, refusal.message)
            return None
        if is_litter(path):
            self.report.skipped += entry.kind != "directory"
        elif entry.kind == "directory":
            self.folders.add(path)
        elif entry.kind != "file":
            self.report.refuse(path, *WHY_REFUSED[entry.kind])
        elif not files.add(path):
            self.report.refuse(path, "duplicate_path", "The archive holds this path twice; the first one is used.")
        else:
            return path
        return None

    def _keep_content(self, path: str, entry: Entry) -> None:
        used = sum(map(len, self.kept.values()))
        data = entry.read(self._limits.max_member_bytes - used)
        if used + len(data) > self._limits.max_member_bytes:
            raise BadArchive(
                f"{path}: metadata files may have {self._limits.max_member_bytes // MIB} MiB together. "
                "Split the data set.",
                code="metadata_too_large",
            )
        self.kept[path] = data

    def _read(self, entry: Entry) -> bytes:
        limit = self._limits.max_member_bytes
        if entry.size <= limit:
            data = entry.read(limit)
            if len(data) <= limit:
                return data
        raise InvalidInput(f"The file has more than {limit // MIB} MiB. Scale the picture down.", code="file_too_large")

    def _entries(self) -> Iterator[Entry]:
        meter = Meter(self._limits, self.path.stat().st_size)
        if self.kind == "zip":
            return zip_reader.entries(self.path, meter)
        return tar_reader.entries(self.path, self.kind.removeprefix("tar").removeprefix("."), meter)


def open_archive(path: Path, limits: Limits | None = None, keep: Callable[[str], bool] = lambda path: False) -> Archive:
    """Recognises the archive by its content, whatever its name. Contents of files for which `keep(path)` is true are
    held from the first pass on. Raises BadArchive (`empty_file`, `unsupported_archive`, `truncated_archive`)."""
    with path.open("rb") as file:
        kind = sniff(file)
    return Archive(path, kind, limits or Limits(), keep)


def sniff(file: BinaryIO) -> str:
    """`zip`, `tar`, `tar.gz`, `tar.bz2` or `tar.xz`, from the beginning of a seekable file, which is rewound. Cheap:
    it refuses an upload before a job is made of it. Raises BadArchive."""
    file.seek(0)
    try:
        return _recognise(file)
    finally:
        file.seek(0)


def _recognise(file: BinaryIO) -> str:
    head = file.read(tar_reader.BLOCK)
    if not head:
        raise BadArchive("The upload is empty (0 bytes). Send the archive again.", code="empty_file")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    compression = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), "")
    block = tar_reader.first_block(file, compression) if compression else head
    if tar_reader.valid_header(block):
        return f"tar.{compression}" if compression else "tar"
    if compression and len(block) < tar_reader.BLOCK:
        raise BadArchive(
            "The compressed data is damaged, cut off or holds no tar archive. Pack it again.", code="truncated_archive"
        )
    unknown = "compressed, but holds no tar or is damaged" if compression else "something else"
    found = next((name for magic, name in _KNOWN_OTHERS.items() if head.startswith(magic)), unknown)
    raise BadArchive(f"The upload is {found}. Send a {_ACCEPTED}.", code="unsupported_archive")
