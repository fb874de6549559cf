"""From the names in an archive to labelled items: `class/file`, `split/class/file`, or a metadata file."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from shared.datasets import metadata as tables
from shared.datasets.classes import Split, check_distinct, class_name, split_of
from shared.datasets.paths import relative
from shared.datasets.report import Notice, Report
from shared.errors import InvalidInput

Layout = Literal["class/file", "split/class/file", "metadata"]
_EXPECTED: Final = "class/file, split/class/file, or a metadata.csv or metadata.jsonl with file_name and label"


@dataclass(frozen=True, slots=True)
class Item:
    """One image to read. `source` is its path in the archive, `path` its identity: the same without a folder that
    wraps the whole data set. `split` is None where the upload does not say."""

    path: str
    class_name: str
    split: Split | None
    caption: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`classes` is sorted and includes those that turn out to have no image."""

    layout: Layout
    items: list[Item]
    classes: list[str]


def plan(names: Sequence[str], metadata: Mapping[str, bytes], directories: Collection[str], report: Report) -> Plan:
    """`names` are the archive's files, `metadata` the content of those that `metadata.is_metadata` recognises,
    `directories` the folders listed for themselves. What cannot be placed is refused in `report`, file by file.

    Raises InvalidInput where no sense can be made of the whole: code `no_images`, `no_class_folders`,
    `class_names_collide`, or one of metadata.parse's.
    """
    files = [name for name in names if not tables.is_metadata(name)]
    prefix = _wrapper(names)
    if metadata:
        result = _from_metadata(files, prefix, metadata, report)
    else:
        result = _from_folders(files, prefix, directories, report)
    if not result.items:
        raise InvalidInput(f"No images found in the places expected: {_EXPECTED}.", code="no_images")
    check_distinct(result.classes)
    return result


def _wrapper(names: Sequence[str]) -> str:
    """The folders around everything, with a trailing slash, or "". Stray files beside it (a README) do not matter."""
    prefix = ""
    while True:
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        tops = {name.split("/", 1)[0] for name in inside if "/" in name}
        if len(tops) != 1 or any(name in tables.FILE_NAMES for name in inside):
            return prefix
        top = tops.pop()
        below = [name[len(top) + 1 :] for name in inside if name.startswith(top + "/")]
        if split_of(top):
            # "train/cat/1.jpg" is a split, "test/train/cat/1.jpg" somebody's folder called test.
            wraps = sum("/" in name and bool(split_of(name.split("/", 1)[0])) for name in below) * 2 > len(below)
        elif any(name in tables.FILE_NAMES for name in below):
            wraps = True
        else:  # "cat/1.jpg" alone is a class
            wraps = sum("/" in name for name in below) * 2 > len(below)
        if not wraps:
            return prefix
        prefix += top + "/"


def _from_folders(files: Sequence[str], prefix: str, directories: Collection[str], report: Report) -> Plan:
    inside = [(name, name[len(prefix) :].split("/")) for name in files if name.startswith(prefix)]
    in_splits = sum(len(parts) == 3 and split_of(parts[0]) is not None for _, parts in inside)
    with_splits = in_splits > sum(len(parts) == 2 for _, parts in inside)
    depth = 3 if with_splits else 2
    layout: Layout = "split/class/file" if with_splits else "class/file"
    items: list[Item] = []
    classes: set[str] = set()
    for name in files:
        if not name.startswith(prefix):
            report.refuse(name, "stray_file", f"The file lies beside the data set, which is in {prefix}")
    for name, parts in inside:
        split = split_of(parts[0]) if with_splits else None
        if len(parts) < depth or (with_splits and split is None):
            report.refuse(name, "stray_file", f"The file lies in no class folder; the layout is {layout}.")
        elif len(parts) > depth:
            report.refuse(name, "too_deep", f"The file lies too deep; the layout is {layout}. Move it up.")
        else:
            try:
                label = class_name(parts[depth - 2])
            except InvalidInput as error:
                report.refuse(name, error.code, error.message)
                continue
            classes.add(label)
            items.append(Item("/".join(parts), label, split, None, name))
    if not with_splits and len(classes) > 1 and all(split_of(name) for name in classes):
        raise InvalidInput(
            f"The files lie directly in split folders, so nothing says their class. Expected: {_EXPECTED}.",
            code="no_class_folders",
        )
    for folder in directories:
        parts = folder[len(prefix) :].split("/") if folder.startswith(prefix) else []
        if len(parts) == depth - 1 and (not with_splits or split_of(parts[0])):
            with suppress(InvalidInput):  # an empty folder of that name does no harm
                classes.add(class_name(parts[-1]))
    return Plan(layout, items, sorted(classes))


def _from_metadata(files: Sequence[str], prefix: str, metadata: Mapping[str, bytes], report: Report) -> Plan:
    rows, conflicts = _rows(metadata, report)
    items: list[Item] = []
    classes: set[str] = set()
    for name in files:
        row = rows.pop(name, None)
        if row is None:
            report.refuse(name, "no_metadata_row", "No row of a metadata file names this file.")
        elif name in conflicts:
            report.refuse(name, "conflicting_rows", f"{row.where}: another row says something else of this file.")
        elif not row.label:
            report.refuse(name, "label_missing", f"{row.where}: the label is empty.")
        else:
            path = name[len(prefix) :] if name.startswith(prefix) else name
            split = split_of(row.split) if row.split else split_of(path.split("/", 1)[0]) if "/" in path else None
            if row.split and split is None:
                report.refuse(name, "unknown_split", f"{row.where}: the split is train, val or test.")
                continue
            try:
                label = class_name(row.label)
            except InvalidInput as error:
                report.refuse(name, error.code, f"{row.where}: {error.message}")
                continue
            classes.add(label)
            items.append(Item(path, label, split, row.caption or None, name))
    for name, row in rows.items():
        report.refuse(name, "file_not_found", f"{row.where}: the archive has no such file that could be read.")
    return Plan("metadata", items, sorted(classes))


def _rows(metadata: Mapping[str, bytes], report: Report) -> tuple[dict[str, tables.Row], set[str]]:
    """The rows by archive path, and the paths about which two rows disagree."""
    rows: dict[str, tables.Row] = {}
    conflicts: set[str] = set()
    repeated = 0
    for path, content in sorted(metadata.items()):
        folder = path[: path.rfind("/") + 1]
        for row in tables.parse(path, content):
            if not row.file_name:
                raise InvalidInput(f"{row.where}: file_name is empty.", code="broken_metadata")
            name = folder + relative(row.file_name)
            first = rows.setdefault(name, row)
            if first is not row:
                repeated += 1
                if (first.label, first.caption, first.split) != (row.label, row.caption, row.split):
                    conflicts.add(name)
    if repeated:
        report.notices.append(Notice("repeated_rows", f"{repeated} rows name a file that another row names as well."))
    return rows, conflicts
