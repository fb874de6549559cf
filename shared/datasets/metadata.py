"""`metadata.csv` and `metadata.jsonl` as the Hugging Face hub lays them out: one row per image, `file_name` relative to
the metadata file's own folder."""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from shared.datasets.report import listed
from shared.errors import InvalidInput

FILE_NAMES: Final = ("metadata.csv", "metadata.jsonl")
COLUMNS: Final = ("file_name", "label", "caption", "split")
_REQUIRED: Final = ("file_name", "label")
_PIECE: Final = 64 * 1024


class Row(NamedTuple):
    """One row as written, stripped; "" where a value is missing. `where` names file and line for messages."""

    where: str
    file_name: str
    label: str
    caption: str
    split: str


def is_metadata(path: str) -> bool:
    """Whether this file describes the others; `open_archive(keep=is_metadata)` holds its content."""
    return path.rsplit("/", 1)[-1] in FILE_NAMES


def parse(path: str, content: bytes) -> Iterator[Row]:
    """Raises InvalidInput where the file as a whole cannot be believed: encoding, columns, ragged rows, broken JSON."""
    encoding = _encoding(path, content)
    for line, values in (_csv if path.endswith(".csv") else _jsonl)(path, content, encoding):
        where = f"{path}, line {line}"
        stripped = {column: values.get(column, "").strip() for column in COLUMNS}
        for column, value in stripped.items():
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
                raise InvalidInput(f"{where}: {column} contains characters that are no text.", code="broken_metadata")
        yield Row(where=where, **stripped)


def _encoding(path: str, content: bytes) -> str:
    """The whole is tried before a row of it is believed, piece by piece: as text it may take four times the memory."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    decoder = codecs.getincrementaldecoder(encoding)()
    for at in range(0, len(content), _PIECE):
        begun = at - len(decoder.getstate()[0])
        try:
            decoder.decode(content[at : at + _PIECE], final=at + _PIECE >= len(content))
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, begun + error.start) + 1
            raise InvalidInput(
                f"{path}, line {line}: not UTF-8. Save the file as UTF-8.", code="metadata_encoding"
            ) from error
    return encoding


def _csv(path: str, content: bytes, encoding: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(content), encoding, newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
            raise InvalidInput(f"{path}: separate the columns with commas.", code="broken_metadata")
        _check_columns(path, header)
        for values in rows:
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(header):
                raise InvalidInput(
                    f"{path}, line {rows.line_num}: {len(values)} values for {len(header)} columns. Quote values that "
                    "contain commas.",
                    code="broken_metadata",
                )
            yield rows.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InvalidInput(
            f"{path}, line {rows.line_num}: broken CSV, look for an unclosed quote before this line.",
            code="broken_metadata",
        ) from error


def _jsonl(path: str, content: bytes, encoding: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(content), encoding, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}, line {number}: not valid JSON.", code="broken_metadata") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}, line {number}: not a JSON object.", code="broken_metadata")
        _check_columns(f"{path}, line {number}", list(row))
        yield number, {key: _value(f"{path}, line {number}", key, value) for key, value in row.items()}


def _value(where: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and column == "label":
        return str(value)
    raise InvalidInput(f"{where}: {column} must be text.", code="broken_metadata")


def _check_columns(where: str, columns: list[str]) -> None:
    if missing := [column for column in _REQUIRED if column not in columns]:
        raise InvalidInput(
            f"{where}: {' and '.join(missing)} missing; columns are file_name, label and, if wanted, caption, split.",
            code="missing_label_column" if missing == ["label"] else "missing_column",
        )
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise InvalidInput(
            f"{where}: unknown column {listed(unknown)}. Rename or remove it; known are {', '.join(COLUMNS)}.",
            code="unknown_column",
        )
    if len(set(columns)) < len(columns):
        raise InvalidInput(f"{where}: a column appears twice.", code="broken_metadata")
