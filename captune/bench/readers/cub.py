"""Caltech-UCSD Birds-200-2011 (Wah et al., 2011): 5,994 train and 5,794 test images of 200 species."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, LayoutError, Reading
from captune.bench.files import Release, drop_missing
from captune.bench.splits import hold_out

TITLE: Final = "CUB"
ARCHIVES: Final = "CUB_200_2011.tgz"


def read(root: Path, seed: int) -> Reading:
    """`images.txt`, `image_class_labels.txt`, `train_test_split.txt` (1: train) and `classes.txt` map ids to a path, a
    class id, a side and `<n>.<Species>`."""
    release = Release(root, "images.txt", title=TITLE, archives=ARCHIVES, folders=("CUB_200_2011",))
    release.need("images")
    species = {number: name.partition(".")[2] or name for number, name in _pairs(release, "classes.txt").items()}
    labels, sides = _pairs(release, "image_class_labels.txt"), _pairs(release, "train_test_split.txt")
    reading = Reading(release.root)
    for number, path in _pairs(release, "images.txt").items():
        label, side = species.get(labels.get(number, "")), sides.get(number)
        if label is None or side not in ("0", "1"):
            raise LayoutError(f"{TITLE}: image {number} ({path}) has no class or no side in {release.root}")
        reading.entries.append(Entry(f"images/{path}", label, "train" if side == "1" else "test"))
    drop_missing(reading)
    hold_out(reading, seed)
    return reading


def _pairs(release: Release, name: str) -> dict[str, str]:
    found = {}
    for line in release.lines(name):
        if len(line) != 2:
            raise release.broken(name, " ".join(line), "<id> <value>")
        found[line[0]] = line[1]
    return found


BENCHMARK: Final = Benchmark(
    TITLE,
    "birds",
    ARCHIVES,
    read,
    paper=78.75,
    images=11788,
    test=5794,
    images_in=("images", "CUB_200_2011/images", ""),
)
