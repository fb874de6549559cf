"""Oxford-IIIT Pet (Parkhi et al., CVPR 2012): 37 breeds, 3,680 trainval and 3,669 test images."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, Reading
from captune.bench.files import Release, drop_missing
from captune.bench.splits import hold_out
from shared.schemas.common import Split

TITLE: Final = "Oxford Pet"
ARCHIVES: Final = "images.tar.gz and annotations.tar.gz"
LISTS: Final[tuple[tuple[Split, str], ...]] = (("train", "annotations/trainval.txt"), ("test", "annotations/test.txt"))


def read(root: Path, seed: int) -> Reading:
    """`images/<Breed>_<n>.jpg`; lines `<Breed>_<n> <class> <species> <breed>`: the name before the last `_` is the
    class."""
    release = Release(root, LISTS[0][1], title=TITLE, archives=ARCHIVES, folders=("oxford-iiit-pet", "oxford_pets"))
    release.need("images")
    reading = Reading(release.root)
    for split, name in LISTS:
        for line in release.lines(name):
            breed, underscore, _ = line[0].rpartition("_")
            if len(line) != 4 or not underscore:
                raise release.broken(name, " ".join(line), "<Breed>_<n> <class> <species> <breed>")
            reading.entries.append(Entry(f"images/{line[0]}.jpg", breed, split))
    drop_missing(reading)
    hold_out(reading, seed)
    return reading


BENCHMARK: Final = Benchmark(TITLE, "pets", ARCHIVES, read, images=7349, test=3669, images_in=("images", ""))
