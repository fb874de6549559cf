"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in their binary version; the Python version is a pickle, which nothing here
ever opens. 50,000 train and 10,000 test images of 32 x 32 pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, LayoutError, Reading
from captune.bench.files import Release
from captune.bench.splits import hold_out
from shared.schemas.common import Split

PIXELS: Final = 3 * 32 * 32  # a plane each of red, green, blue


@dataclass(frozen=True, slots=True)
class _Layout:
    """Each record: `labels` bytes, of which the last is the (fine) label, then the pixels."""

    title: str
    archive: str
    folder: str
    names: str
    labels: int
    train: tuple[str, ...]
    test: str
    pickled: tuple[str, ...]


TEN: Final = _Layout(
    "CIFAR-10",
    "cifar-10-binary.tar.gz",
    "cifar-10-batches-bin",
    "batches.meta.txt",
    1,
    tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
    "test_batch.bin",
    ("data_batch_1", "cifar-10-batches-py"),
)
HUNDRED: Final = _Layout(
    "CIFAR-100",
    "cifar-100-binary.tar.gz",
    "cifar-100-binary",
    "fine_label_names.txt",
    2,
    ("train.bin",),
    "test.bin",
    ("train", "cifar-100-python"),
)


def reader(layout: _Layout) -> Callable[[Path, int], Reading]:
    def read(root: Path, seed: int) -> Reading:
        _refuse_pickled(root, layout)
        release = Release(root, layout.train[0], title=layout.title, archives=layout.archive, folders=(layout.folder,))
        names = [line.strip() for line in release.text(layout.names).splitlines() if line.strip()]
        reading = Reading(release.root)
        for file in layout.train:
            reading.entries += _records(release, file, layout, names, "train")
        reading.entries += _records(release, layout.test, layout, names, "test")
        hold_out(reading, seed, share=0.1)
        return reading

    return read


def _records(release: Release, file: str, layout: _Layout, names: list[str], split: Split) -> list[Entry]:
    path, size = release.need(file), layout.labels + PIXELS
    records, rest = divmod(path.stat().st_size, size)
    if rest:
        raise LayoutError(f"{layout.title}: {path} is cut off: its length is no multiple of {size} bytes")
    found = []
    with path.open("rb") as data:
        for number in range(records):
            data.seek(number * size)
            label = data.read(layout.labels)[-1]
            if label >= len(names):
                raise LayoutError(f"{layout.title}: {path}, record {number}: label {label}, of {len(names)} classes")
            name = f"{split}/{names[label]}/{path.stem}_{number:05d}.png"
            found.append(Entry(name, names[label], split, file, number * size + layout.labels))
    return found


def _refuse_pickled(root: Path, layout: _Layout) -> None:
    binary = any((place / layout.train[0]).exists() for place in (root, root / layout.folder))
    if not binary and any((root / name).exists() for name in layout.pickled):
        raise LayoutError(
            f"{layout.title}: {root} holds the Python version, a pickle, which can run any code and is never opened. "
            f"Take the binary version, {layout.archive} ({layout.folder}/), from the same authors"
        )


CIFAR10: Final = Benchmark(
    TEN.title, "general objects", TEN.archive, reader(TEN), paper=98.04, images=60000, test=10000
)
CIFAR100: Final = Benchmark(
    HUNDRED.title, "general objects", HUNDRED.archive, reader(HUNDRED), paper=88.92, images=60000, test=10000
)
