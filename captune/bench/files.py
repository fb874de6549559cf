"""Files of official releases: found, or refused by name."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from captune.bench.data import LayoutError, Reading

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


class Release:
    """The folder that a user named, or one of the `folders` in it that the release unpacks to: the first that holds one
    of the `markers` (files or folders). `title` and `archives` go into messages."""

    def __init__(self, root: Path, *markers: str, title: str, archives: str, folders: Iterable[str] = ()) -> None:
        self.title, self.archives = title, archives
        if not root.is_dir():
            raise LayoutError(f"{title}: {root} is no folder")
        places = [root, *(root / name for name in folders)]
        self.root = next((place for place in places if any((place / each).exists() for each in markers)), root)
        self.need(*markers)

    def missing(self, what: str, because: str = "") -> LayoutError:
        return LayoutError(
            f"{self.title}: {self.root} has no {what}{because}. It is part of {self.archives}, as the data set's "
            "authors distribute it: unpack that there, or name the folder where it is"
        )

    def need(self, *names: str) -> Path:
        """The first of these files or folders that is there."""
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        raise self.missing(" or ".join(names))

    def lines(self, name: str) -> list[list[str]]:
        """The file's lines, split at white space; empty lines and comments (#) left out."""
        text = self.text(name)
        return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]

    def text(self, name: str) -> str:
        path = self.need(name)
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LayoutError(f"{self.title}: {path} cannot be read as text ({error})") from None

    def table(self, name: str, delimiter: str, columns: Iterable[str]) -> Iterator[dict[str, str]]:
        """Rows of a CSV file with a header that has at least these columns."""
        rows = csv.DictReader(self.text(name).splitlines(), delimiter=delimiter)
        if lacking := [column for column in columns if column not in (rows.fieldnames or ())]:
            raise LayoutError(f"{self.title}: {self.root / name} has no column {', '.join(lacking)}")
        for row in rows:
            if any(row[column] is None for column in columns):
                raise LayoutError(f"{self.title}: {self.root / name}, line {rows.line_num}: too few values")
            yield row

    def mat(self, name: str) -> Mapping[str, Any]:
        """A MATLAB v5 file; structs as objects with attributes, arrays squeezed."""
        path = self.need(name)
        try:
            from scipy.io import loadmat
        except ImportError:
            raise LayoutError(f"{self.title}: reading {path.name} needs SciPy: pip install 'captune[bench]'") from None
        try:
            found: Mapping[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=False)
        except Exception as error:  # whatever a damaged file makes the parser raise
            raise LayoutError(f"{self.title}: {path} is no MATLAB v5 file that can be read ({error})") from None
        return found

    def field(self, found: Mapping[str, Any], name: str, file: str) -> Any:
        if name not in found:
            raise LayoutError(f"{self.title}: {self.root / file} holds no '{name}'; is it the file of {self.archives}?")
        return found[name]

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"{self.title}: {self.root / name} is no valid JSON ({error})") from None

    def broken(self, name: str, line: object, expected: str) -> LayoutError:
        return LayoutError(f"{self.title}: {self.root / name}, '{line}': expected {expected}")

    def folders(self, name: str) -> list[Path]:
        """The folders in a folder, by name; hidden ones left out."""
        return sorted(path for path in self.need(name).iterdir() if path.is_dir() and not path.name.startswith("."))


def pictures(folder: Path) -> list[str]:
    """Names of the pictures that lie in a folder, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))


def drop_missing(reading: Reading) -> None:
    """Images that the lists name but the folder lacks are refused one by one; the rest goes on. In place."""
    there = []
    for entry in reading.entries:
        if not is_inside(entry.path):
            reading.refused.append((entry.path, "the path leads out of the data set"))
        elif not (reading.root / entry.path).is_file():
            reading.refused.append((entry.path, f"the lists name it ({entry.split}), but there is no such file"))
        else:
            there.append(entry)
    reading.entries = there


def is_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "\\" not in path
