"""Caltech 101 (Fei-Fei et al., 2004), without splits. As in CoOp (arXiv 2109.01134), 100 classes: the background and
the cropped `Faces_easy` (the same people as `Faces`) are left out, and four folders get plainer names."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, Reading
from captune.bench.files import Release, pictures
from captune.bench.splits import three_ways

TITLE: Final = "Caltech101"
ARCHIVES: Final = "caltech-101.zip (101_ObjectCategories.tar.gz in it)"
LEFT_OUT: Final = ("BACKGROUND_Google", "Faces_easy")
NAMES: Final = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


def read(root: Path, seed: int) -> Reading:
    """`101_ObjectCategories/<class>/image_<n>.jpg`."""
    folder = "101_ObjectCategories"
    release = Release(root, folder, title=TITLE, archives=ARCHIVES, folders=("caltech-101", "caltech101"))
    reading = Reading(release.root)
    for each in release.folders(folder):
        if each.name not in LEFT_OUT:
            label = NAMES.get(each.name, each.name)
            found = pictures(each)
            reading.entries += [Entry(f"{folder}/{each.name}/{file}", label, "train") for file in found]
    three_ways(reading, seed)
    reading.notes.append(f"without {' and '.join(LEFT_OUT)}, as in CoOp")
    return reading


BENCHMARK: Final = Benchmark(
    TITLE, "general objects", ARCHIVES, read, paper=96.73, images_in=("101_ObjectCategories", "")
)
