"""Captions made elsewhere, as files hold them: JSON, JSONL, CSV, or `.txt` sidecars in a zip or tar.

Every reader gives one entry at a time in flat memory, and refuses what it cannot use entry by entry; only a file that
makes no sense as a whole raises."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from services.captioner.transfer.json_elements import elements
from shared.datasets.archive import open_archive, sniff
from shared.datasets.limits import MIB, BadArchive, Limits
from shared.datasets.report import listed
from shared.errors import InvalidInput
from shared.schemas.captions import TransferFormat
from shared.spreadsheet import restored

IMPORTED: Final = "imported"  # the characteristic of a caption that came without one
MAX_CAPTION: Final = 4_000  # characters
MAX_NAME: Final = 1_024
MAX_CHARACTERISTIC: Final = 40
MAX_LINE: Final = MIB
NAME_KEYS: Final = ("path", "file_name", "image")
TEXT_KEYS: Final = ("caption", "captions", "text")
_ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_CELLS: Final = {"true": True, "false": False, "": None}  # of the column excluded
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")  # what PostgreSQL cannot hold, and bytes that are no UTF-8


@dataclass(frozen=True, slots=True)
class Entry:
    """One caption. `where` in the file it stands, `name` the image as the file writes it; a sidecar's name ends in
    `.txt`, and it cannot say that a caption is `excluded` from training."""

    where: str
    name: str
    text: str
    characteristic: str = IMPORTED
    sidecar: bool = False
    excluded: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    where: str
    code: str
    message: str


Found = Iterator[Entry | Refused]


def guess(file: BinaryIO, name: str) -> TransferFormat:
    """The format by the file's name and first 64 KiB; the file is rewound. Raises InvalidInput (`empty_file`,
    `unknown_format`, `not_utf8`, or what `archive.sniff` says of a damaged archive)."""
    head = _head(file)
    suffix = name.lower()
    if suffix.endswith(_ARCHIVES) or head.startswith(_MAGIC) or head[257:262] == b"ustar":
        sniff(file)
        return "txt"
    if suffix.endswith(".csv"):
        return "csv"
    if suffix.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    text = head.decode("utf-8-sig", "replace").lstrip()
    first = text.partition("\n")[0]
    if text.startswith("["):
        return "json"
    if text.startswith("{"):  # a record on the first line begins JSONL, whatever the file is called
        return "jsonl" if _is_record(first) else "json"
    columns = {column.strip().strip('"').lower() for column in first.split(",")}
    if columns & {*NAME_KEYS} and columns & {*TEXT_KEYS}:
        return "csv"
    raise InvalidInput(
        "The file is neither JSON, JSONL, CSV with a header, nor a zip or tar of .txt files (a single .txt file does "
        "not say its image: pack it). Say which with 'format'.",
        code="unknown_format",
        param="format",
    )


def check(file: BinaryIO, format: TransferFormat) -> None:
    """Refuse at once what is no file of this format; it is rewound. Raises InvalidInput as `guess` does."""
    _head(file)
    if format == "txt":
        sniff(file)


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(0)
    if not head.strip():
        raise InvalidInput("The file is empty. Send it again.", code="empty_file", param="file")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidInput("The file is UTF-16. Save it as UTF-8.", code="not_utf8", param="file")
    return head


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in NAME_KEYS)


def read(path: Path, format: TransferFormat) -> Found:
    """Every caption of the file in its order, and what was refused between them. Raises InvalidInput: `broken_json`,
    `missing_column`, `no_sidecars`, or BadArchive."""
    if format == "txt":
        yield from _sidecars(path)
        return
    with path.open("rb") as file:
        yield from {"json": _json, "jsonl": _jsonl, "csv": _csv}[format](file)


def _json(file: BinaryIO) -> Found:
    for number, (key, value) in enumerate(elements(file), 1):
        where = f"entry {number}"
        if key is None:
            yield from _record(where, value)
        else:
            yield from _captions(where, key, value, {})


def _jsonl(file: BinaryIO) -> Found:
    lines = _Lines(file)
    for line in lines:
        yield from lines.refusals()
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield Refused(f"line {lines.number}", "broken_json", "The line is no valid JSON.")
        else:
            yield from _record(f"line {lines.number}", value)
    yield from lines.refusals()


def _csv(file: BinaryIO) -> Found:
    lines = _Lines(file)
    rows = _rows(lines)
    _, header = next(rows, ("", None))
    columns = _columns(header or [])
    for where, values in rows:
        yield from lines.refusals()
        if values is None:
            yield Refused(where, "broken_csv", "The line is no valid CSV; look for an unclosed or a stray quote.")
        elif len(values) != len(columns):
            message = f"{len(values)} values for {len(columns)} columns. Quote values that contain commas."
            yield Refused(where, "wrong_width", message)
        else:
            row = dict(zip(columns, map(restored, values), strict=True))
            cell = row.get("excluded", "").strip().lower()
            marks = {"characteristic": row.get("characteristic"), "excluded": _CELLS.get(cell, cell)}
            yield _entry(where, row["name"], row["text"], marks)
    yield from lines.refusals()


def _rows(lines: "_Lines") -> Iterator[tuple[str, list[str] | None]]:
    """The rows that are not blank, None for a broken one, after which the reader goes on with the next line."""
    rows = csv.reader(iter(lines), strict=True)
    while True:
        where = f"line {lines.number + 1}"
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield where, None
        else:
            if any(value.strip() for value in values):
                yield where, values


def _columns(header: Sequence[str]) -> list[str]:
    """What each column holds: "name", "text", "characteristic", "excluded", or its own name with a space before it."""
    names = [column.strip().lower() for column in header]
    name = next((key for key in NAME_KEYS if key in names), None)
    text = next((key for key in TEXT_KEYS if key in names), None)
    if name is None or text is None:
        semicolons = len(names) == 1 and any(mark in names[0] for mark in ";\t")
        hint = "separate the columns with commas" if semicolons else f"it has {listed(names)}"
        raise InvalidInput(
            "The CSV's first line must name a column file_name, path or image and a column caption or text, if wanted "
            f"also characteristic and excluded; {hint}.",
            code="missing_column",
            param="file",
        )
    known = {name: "name", text: "text", "characteristic": "characteristic", "excluded": "excluded"}
    return [known.pop(column, f" {column}") for column in names]  # of two columns of one name the first counts


class _Lines:
    """The lines of a file with their ends, in bounded memory. `number` is that of the latest, from 1; bytes that are no
    UTF-8 become lone surrogates, so that they are refused where they stand."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._refused: list[Refused] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE):
            self.number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := self._file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                message = f"The line is longer than {MAX_LINE:,} bytes."
                self._refused.append(Refused(f"line {self.number}", "line_too_long", message))
                continue
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")

    def refusals(self) -> list[Refused]:
        """Those since the last call."""
        found, self._refused = self._refused, []
        return found


def _sidecars(path: Path) -> Found:
    """`path/with/image.txt`: one caption per line that is not blank. Whatever else the archive holds is left alone."""
    archive = open_archive(path, Limits(max_member_bytes=MIB))
    if not any(name.lower().endswith(".txt") for name in archive.names()):
        raise InvalidInput(
            "The archive holds no .txt file; a sidecar is called like its image.", code="no_sidecars", param="file"
        )
    for refusal in archive.report.refusals:
        yield Refused(refusal.path, refusal.code, refusal.message)
    for member in archive.members():
        if not member.path.lower().endswith(".txt"):
            continue
        if member.size > MIB:
            yield Refused(member.path, "file_too_large", f"A sidecar may have {MIB:,} bytes.")
            continue
        try:
            data = member.read()
        except BadArchive:
            raise
        except InvalidInput as refused:
            yield Refused(member.path, refused.code, refused.message)
            continue
        text = data.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
        if not text.strip():
            yield Refused(member.path, "empty_caption", "The file holds no caption.")
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _entry(f"{member.path}, line {number}", member.path, line, {}, sidecar=True)


def _record(where: str, value: Any) -> Found:
    """`{"file_name": …, "caption": …}`; other keys do no harm."""
    if not isinstance(value, dict):
        yield Refused(where, "not_a_record", "An object with file_name (or path, image) and caption is expected.")
        return
    name = next((value[key] for key in NAME_KEYS if isinstance(value.get(key), str)), None)
    yield from _captions(where, name, _text_of(value), value)


def _text_of(record: Mapping[str, Any]) -> Any:
    return next((record[key] for key in TEXT_KEYS if record.get(key) is not None), None)


def _marks(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("characteristic", "excluded") if key in record}


def _captions(where: str, name: Any, value: Any, marks: Mapping[str, Any]) -> Found:
    """A text, an object with one, or a list of either. Marks that an object lacks are those of what it stands in."""
    for each in value or [None] if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            yield _entry(where, name, _text_of(each), {**marks, **_marks(each)})
        else:
            yield _entry(where, name, each, marks)


def _entry(where: str, name: Any, text: Any, marks: Mapping[str, Any], *, sidecar: bool = False) -> Entry | Refused:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or _NO_TEXT.search(name):
        return Refused(where, "bad_name", f"The image's name is missing, no text, or over {MAX_NAME:,} characters.")
    if text is None or (isinstance(text, str) and not text.strip()):
        return Refused(where, "empty_caption", f"{name}: there is no caption.")
    if not isinstance(text, str) or _NO_TEXT.search(text):
        return Refused(where, "not_text", f"{name}: the caption is no text in UTF-8.")
    text = text.strip()
    if len(text) > MAX_CAPTION:
        return Refused(where, "caption_too_long", f"{name}: the caption has over {MAX_CAPTION:,} characters.")
    characteristic = marks.get("characteristic")
    if characteristic is None or characteristic == "":
        characteristic = IMPORTED
    if (
        not isinstance(characteristic, str)
        or len(characteristic) > MAX_CHARACTERISTIC
        or not characteristic.isprintable()
    ):
        message = f"{name}: the characteristic is no word of at most {MAX_CHARACTERISTIC} characters."
        return Refused(where, "bad_characteristic", message)
    excluded = marks.get("excluded")
    if excluded is not None and not isinstance(excluded, bool):
        return Refused(where, "bad_excluded", f"{name}: excluded is neither true nor false.")
    return Entry(where, name, text, characteristic.strip() or IMPORTED, sidecar, bool(excluded))
