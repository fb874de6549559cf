"""CoOp's splits (Zhou et al., arXiv 2109.01134): `split_zhou_<Name>.json` with `train`, `val` and `test`, each a list
of [path, label, class name]. Where one lies in a data set's folder, it decides."""

import json
from pathlib import Path
from typing import Any

from captune.bench.data import SPLITS, Entry, LayoutError, Reading
from captune.bench.files import drop_missing, is_inside

PATTERN = "split_zhou_*.json"


def find(root: Path) -> Path | None:
    """The folder's split file. Raises LayoutError where it has several."""
    found = sorted(root.glob(PATTERN))
    if len(found) > 1:
        raise LayoutError(f"{root} holds {' and '.join(path.name for path in found)}; leave the one that shall decide")
    return found[0] if found else None


def read(split_file: Path, images_in: tuple[str, ...] = ("",)) -> Reading:
    """`images_in`: folders beside the file, of which one is what its paths begin in. Raises LayoutError."""
    try:
        splits = json.loads(split_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"{split_file} is no JSON file that can be read ({error})") from None
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise LayoutError(f"{split_file}: expected an object with 'train', 'val' and 'test'")
    reading = Reading(split_file.parent, official=False)
    seen: dict[str, str] = {}
    names: dict[int, str] = {}
    for split in SPLITS:
        if not isinstance(splits[split], list):
            raise LayoutError(f"{split_file}: '{split}' is no list")
        for number, item in enumerate(splits[split]):
            path, label, name = _item(item, f"{split_file}: {split}, entry {number}")
            if names.setdefault(label, name) != name:
                raise LayoutError(f"{split_file}: label {label} is called '{names[label]}' and '{name}'")
            if path in seen:
                raise LayoutError(f"{split_file}: '{path}' is in {seen[path]} and again in {split}")
            seen[path] = split
            reading.entries.append(Entry(path, name, split))
    if len(set(names.values())) < len(names):
        raise LayoutError(f"{split_file}: two labels have the same class name")
    reading.root = _root(split_file.parent, images_in, reading.entries)
    reading.notes.append(f"splits as in {split_file.name}")
    drop_missing(reading)
    return reading


def _item(item: Any, where: str) -> tuple[str, int, str]:
    match item:
        case [str(path), int(label), str(name)] if path and name.strip() and not isinstance(label, bool):
            return path, label, name.strip()
    raise LayoutError(f"{where}: expected [path, label number, class name]")


def _root(folder: Path, images_in: tuple[str, ...], entries: list[Entry]) -> Path:
    first = next((entry.path for entry in entries if is_inside(entry.path)), "")
    return next((folder / each for each in images_in if (folder / each / first).is_file()), folder)
