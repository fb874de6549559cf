"""From the names in an archive to labelled items: `class/file`, `split/class/file`, or a metadata file."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from shared.datasets import metadata as tables
from shared.datasets.catalogue import Names, Records
from shared.datasets.classes import Split, check_distinct, class_name, split_of
from shared.datasets.paths import relative
from shared.datasets.report import Notice, Report
from shared.errors import InvalidInput

Layout = Literal["class/file", "split/class/file", "metadata"]
_EXPECTED: Final = "class/file, split/class/file, or a metadata.csv or metadata.jsonl with file_name and label"


MAX_CLASSES: Final = 100_000


class Item(NamedTuple):
    """One image to read. `source` is its path in the archive, `path` its identity: the same without a folder that
    wraps the whole data set. `split` is None where the upload does not say."""

    path: str
    class_name: str
    split: Split | None
    caption: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`items` by source, in archive order. `classes` is sorted and includes those that turn out to have no image."""

    layout: Layout
    items: Records[Item]
    classes: list[str]


def plan(names: Iterable[str], metadata: Mapping[str, bytes], directories: Iterable[str], report: Report) -> Plan:
    """`names` are the archive's files, gone through several times, `metadata` the content of those that
    `metadata.is_metadata` recognises, `directories` the folders listed for themselves. What cannot be placed is refused
    in `report`, file by file.

    Raises InvalidInput where no sense can be made of the whole: code `no_images`, `no_class_folders`,
    `class_names_collide`, `too_many_classes`, or one of metadata.parse's.
    """
    prefix = _wrapper(names)
    if metadata:
        result = _from_metadata(names, prefix, metadata, report)
    else:
        result = _from_folders(names, prefix, directories, report)
    if not result.items:
        raise InvalidInput(f"No images found in the places expected: {_EXPECTED}.", code="no_images")
    check_distinct(result.classes)
    return result


def _files(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not tables.is_metadata(name))


def _wrapper(names: Iterable[str]) -> str:
    """The folders around everything, with a trailing slash, or "". Stray files beside it (a README) do not matter."""
    prefix = ""
    while top := _wrapping_folder(names, prefix):
        prefix += top + "/"
    return prefix


def _wrapping_folder(names: Iterable[str], prefix: str) -> str | None:
    """The only folder below `prefix`, where that is around a data set; a class's or a split's folder is not."""
    top = None
    described = False  # by a metadata file directly in it
    files = nested = in_splits = 0
    for name in names:
        if not name.startswith(prefix):
            continue
        folder, slash, below = name[len(prefix) :].partition("/")
        if not slash:
            if folder in tables.FILE_NAMES:
                return None
            continue
        if folder != (top := top or folder):
            return None
        inner, slash, _ = below.partition("/")
        files += 1
        nested += bool(slash)
        in_splits += bool(slash and split_of(inner))
        described |= not slash and inner in tables.FILE_NAMES
    if top is not None and split_of(top):
        # "train/cat/1.jpg" is a split, "test/train/cat/1.jpg" somebody's folder called test.
        return top if in_splits * 2 > files else None
    return top if described or nested * 2 > files else None  # "cat/1.jpg" alone is a class


def _from_folders(names: Iterable[str], prefix: str, directories: Iterable[str], report: Report) -> Plan:
    in_splits = in_classes = 0
    for name in _files(names):
        if not name.startswith(prefix):
            report.refuse(name, "stray_file", f"The file lies beside the data set, which is in {prefix}")
            continue
        parts = name[len(prefix) :].split("/")
        in_splits += len(parts) == 3 and split_of(parts[0]) is not None
        in_classes += len(parts) == 2
    with_splits = in_splits > in_classes
    depth = 3 if with_splits else 2
    layout: Layout = "split/class/file" if with_splits else "class/file"
    items = Records(Item._make)
    classes = _Classes()
    for name in _files(names):
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
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
            items.add(name, Item("/".join(parts), label, split, None, name))
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


def _from_metadata(names: Iterable[str], prefix: str, metadata: Mapping[str, bytes], report: Report) -> Plan:
    rows, conflicts = _rows(metadata, report)
    items = Records(Item._make)
    classes = _Classes()
    for name in _files(names):
        row = rows.get(name)
        if row is None:
            report.refuse(name, "no_metadata_row", "No row of a metadata file names this file.")
            continue
        rows.remove(name)
        if name in conflicts:
            report.refuse(name, "conflicting_rows", f"{row.where}: another row says something else of this file.")
        elif not row.label:
            report.refuse(name, "label_missing", f"{row.where}: the label is empty.")
        else:
            path = name.removeprefix(prefix)
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
            items.add(name, Item(path, label, split, row.caption or None, name))
    for name, row in rows.items():
        report.refuse(name, "file_not_found", f"{row.where}: the archive has no such file that could be read.")
    return Plan("metadata", items, sorted(classes))


def _rows(metadata: Mapping[str, bytes], report: Report) -> tuple[Records[tables.Row], Names]:
    """The rows by archive path, and the paths about which two rows disagree."""
    rows = Records(tables.Row._make)
    conflicts = Names()
    repeated = 0
    for path, content in sorted(metadata.items()):
        folder = path[: path.rfind("/") + 1]
        for row in tables.parse(path, content):
            if not row.file_name:
                raise InvalidInput(f"{row.where}: file_name is empty.", code="broken_metadata")
            name = folder + relative(row.file_name)
            if rows.add(name, row):
                continue
            repeated += 1
            first = rows.get(name)
            if first and (first.label, first.caption, first.split) != (row.label, row.caption, row.split):
                conflicts.add(name)
    if repeated:
        report.notices.append(Notice("repeated_rows", f"{repeated} rows name a file that another row names as well."))
    return rows, conflicts


class _Classes(set[str]):
    def add(self, name: str) -> None:
        """Raises InvalidInput for one class too many: the names of all are held in memory, here and in every job."""
        super().add(name)
        if len(self) > MAX_CLASSES:
            raise InvalidInput(
                f"The upload has more than {MAX_CLASSES:,} classes. Check that each picture's folder, or its label, "
                "names its class.",
                code="too_many_classes",
            )
