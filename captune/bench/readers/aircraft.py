"""FGVC-Aircraft (Maji et al., arXiv 1306.5151): 100 variants, 3,334 / 3,333 / 3,333 images."""

from pathlib import Path
from typing import Final

from captune.bench.data import SPLITS, Benchmark, Entry, Reading
from captune.bench.files import Release, drop_missing

TITLE: Final = "Aircraft"
ARCHIVES: Final = "fgvc-aircraft-2013b.tar.gz"


def read(root: Path, seed: int) -> Reading:
    """`images/<n>.jpg` and `images_variant_{train,val,test}.txt`: `<n> <Variant>`, the variant maybe of several
    words."""
    folders = ("data", "fgvc-aircraft-2013b/data", "fgvc_aircraft")
    release = Release(root, "images_variant_train.txt", title=TITLE, archives=ARCHIVES, folders=folders)
    release.need("images")
    reading = Reading(release.root, notes=["splits of the release"])
    for split in SPLITS:
        for line in release.lines(name := f"images_variant_{split}.txt"):
            if len(line) < 2:
                raise release.broken(name, " ".join(line), "<image number> <Variant>")
            reading.entries.append(Entry(f"images/{line[0]}.jpg", " ".join(line[1:]), split))
    drop_missing(reading)
    return reading


BENCHMARK: Final = Benchmark(TITLE, "aircrafts", ARCHIVES, read, images=10000, test=3333, images_in=("images", ""))
