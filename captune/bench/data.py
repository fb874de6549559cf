"""What a reader gives: labelled images with their splits, and what is to be told of them."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from captune.bench import png
from shared.schemas.common import Split

SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")


class LayoutError(ValueError):
    """The folder is not the data set as it is distributed; the message names what is missing and where it is from."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image. `path`, with '/', is its identity in the upload; `offset` is where its pixels begin in `packed`, a
    file of many (both below the data set's folder), else `path` is a file itself."""

    path: str
    label: str
    split: Split
    packed: str | None = None
    offset: int = 0

    def content(self, root: Path) -> bytes:
        """The image file's bytes; 32 x 32 pixels of a packed file (CIFAR) become a PNG."""
        if self.packed is None:
            return (root / self.path).read_bytes()
        with (root / self.packed).open("rb") as file:
            file.seek(self.offset)
            return png.from_planes(file.read(3 * 32 * 32), 32, 32)


@dataclass(slots=True)
class Reading:
    """`root`: what the entries' paths are relative to. `notes`: where the splits come from. `refused`: (path, reason)
    of images that the lists name but that cannot be used. `official`: the splits are those of the release."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    official: bool = True

    @property
    def classes(self) -> list[str]:
        """In label order, which is the server's: sorted."""
        return sorted({entry.label for entry in self.entries})

    def counts(self) -> dict[Split, dict[str, int]]:
        """Images by split and class."""
        found = {split: Counter[str]() for split in SPLITS}
        for entry in self.entries:
            found[entry.split][entry.label] += 1
        return {split: dict(sorted(counts.items())) for split, counts in found.items()}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A data set of the paper's protocol.

    `domain`: its word in prompts (MMFT, arXiv 2601.21426). `paper`: MMFT's accuracy in % as that paper reports it.
    `archives`: what its authors distribute. `images` and `test`: how many the whole release has; None where that
    depends on how it is split. `read(root, seed)` raises LayoutError; `images_in`: where a CoOp split's paths begin."""

    title: str
    domain: str
    archives: str
    read: Callable[[Path, int], Reading]
    paper: float | None = None
    images: int | None = None
    test: int | None = None
    images_in: tuple[str, ...] = ("",)


def check(reading: Reading, title: str) -> None:
    """Refuses what the server would refuse only after the upload. Raises LayoutError."""
    counts = reading.counts()
    if len(reading.classes) < 2:
        raise LayoutError(f"{title}: {reading.root} holds images of {len(reading.classes)} classes; two are the least")
    for split in SPLITS:
        if not counts[split]:
            raise LayoutError(f"{title}: no image of the {split} split was found in {reading.root}")
    if untrained := sorted((counts["val"].keys() | counts["test"].keys()) - counts["train"].keys()):
        raise LayoutError(f"{title}: classes without a train image: {listed(untrained)}; is the folder complete?")
    seen: dict[str, str] = {}
    for name in reading.classes:
        if (other := seen.setdefault(spoken(name), name)) != name:
            raise LayoutError(f"{title}: the classes '{other}' and '{name}' would be called alike in captions")


def shortfall(reading: Reading, benchmark: Benchmark) -> list[str]:
    """What is missing of the release; scores are not comparable with others' then."""
    test = sum(entry.split == "test" for entry in reading.entries)
    if reading.official and benchmark.test is not None and test != benchmark.test:
        return [f"test has {test:,} images, the whole release {benchmark.test:,}: compare with care"]
    if benchmark.images is not None and len(reading.entries) != benchmark.images:
        return [f"{len(reading.entries):,} images of the release's {benchmark.images:,}"]
    return []


def spoken(name: str) -> str:
    """What captions call a class, for telling whether two would be called alike (the server's rule)."""
    words = name.replace("_", " ").replace("-", " ").lower().split()
    return unicodedata.normalize("NFKC", " ".join(words)).casefold()


def by_label(entries: Iterable[Entry]) -> Mapping[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.label, []).append(entry)
    return found


def listed(names: list[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
