"""EuroSAT, the RGB version (Helber et al., 2019): 27,000 Sentinel-2 patches of 10 kinds of land, without splits."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, Reading
from captune.bench.files import Release, pictures
from captune.bench.splits import three_ways

TITLE: Final = "EuroSAT"
ARCHIVES: Final = "EuroSAT.zip or EuroSAT_RGB.zip (2750/ or EuroSAT_RGB/)"
# The folders' names, as CoOp (arXiv 2109.01134) writes them out for CLIP.
NAMES: Final = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def read(root: Path, seed: int) -> Reading:
    """`<Class>/<Class>_<n>.jpg`."""
    release = Release(root, *NAMES, title=TITLE, archives=ARCHIVES, folders=("2750", "EuroSAT_RGB", "EuroSAT/2750"))
    reading = Reading(release.root)
    for folder, name in NAMES.items():
        found = pictures(release.need(folder))
        reading.entries += [Entry(f"{folder}/{file}", name, "train") for file in found]
    three_ways(reading, seed)
    return reading


BENCHMARK: Final = Benchmark(
    TITLE, "satellite", ARCHIVES, read, paper=98.97, images=27000, images_in=("2750", "EuroSAT_RGB", "")
)
