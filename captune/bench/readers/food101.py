"""Food-101 (Bossard et al., ECCV 2014): 101 dishes, 750 train images each (with wrong labels among them) and 250 for
test."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, Reading
from captune.bench.files import Release, drop_missing
from captune.bench.splits import hold_out
from shared.schemas.common import Split

TITLE: Final = "Food101"
ARCHIVES: Final = "food-101.tar.gz"
SIDES: Final[tuple[Split, ...]] = ("train", "test")


def read(root: Path, seed: int) -> Reading:
    """`images/<class>/<n>.jpg` and `meta/{train,test}.txt`: `<class>/<n>` per line."""
    release = Release(root, "meta/train.txt", title=TITLE, archives=ARCHIVES, folders=("food-101",))
    release.need("images")
    reading = Reading(release.root)
    for split in SIDES:
        for line in release.lines(name := f"meta/{split}.txt"):
            label, slash, _ = line[0].partition("/")
            if len(line) != 1 or not slash:
                raise release.broken(name, " ".join(line), "<class>/<number>")
            reading.entries.append(Entry(f"images/{line[0]}.jpg", label, split))
    drop_missing(reading)
    hold_out(reading, seed, share=0.1)
    return reading


BENCHMARK: Final = Benchmark(
    TITLE, "food", ARCHIVES, read, paper=88.79, images=101000, test=25250, images_in=("images", "food-101/images", "")
)
