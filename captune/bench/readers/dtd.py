"""Describable Textures Dataset (Cimpoi et al., CVPR 2014): 47 classes x 120, in ten splits of 40 / 40 / 40; the first
is used, as is usual."""

from pathlib import Path
from typing import Final

from captune.bench.data import SPLITS, Benchmark, Entry, Reading
from captune.bench.files import Release, drop_missing

TITLE: Final = "DTD"
ARCHIVES: Final = "dtd-r1.0.1.tar.gz"


def read(root: Path, seed: int) -> Reading:
    """`images/<class>/<file>` and `labels/{train,val,test}1.txt`, a path per line."""
    release = Release(root, "labels/train1.txt", title=TITLE, archives=ARCHIVES, folders=("dtd",))
    release.need("images")
    reading = Reading(release.root, notes=["split 1 of the release's ten"])
    for split in SPLITS:
        for line in release.lines(name := f"labels/{split}1.txt"):
            label, slash, _ = line[0].partition("/")
            if len(line) != 1 or not slash:
                raise release.broken(name, " ".join(line), "<class>/<file>")
            reading.entries.append(Entry(f"images/{line[0]}", label, split))
    drop_missing(reading)
    return reading


BENCHMARK: Final = Benchmark(
    TITLE, "textures", ARCHIVES, read, paper=77.68, images=5640, test=1880, images_in=("images", "dtd/images", "")
)
