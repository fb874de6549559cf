"""`captune bench`: published protocols over the REST API. A new data set is one file in readers/ and one line here."""

from pathlib import Path

from captune.bench.data import Benchmark, LayoutError, Reading, check
from captune.bench.readers import (
    aircraft,
    caltech101,
    cars,
    cifar,
    coop,
    cub,
    dtd,
    eurosat,
    flowers102,
    food101,
    gtsrb,
    imagenet,
    oxford_pet,
)

READERS: dict[str, Benchmark] = {
    "dtd": dtd.BENCHMARK,
    "flowers102": flowers102.BENCHMARK,
    "oxford_pet": oxford_pet.BENCHMARK,
    "eurosat": eurosat.BENCHMARK,
    "caltech101": caltech101.BENCHMARK,
    "cub": cub.BENCHMARK,
    "cars": cars.BENCHMARK,
    "aircraft": aircraft.BENCHMARK,
    "gtsrb": gtsrb.BENCHMARK,
    "food101": food101.BENCHMARK,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "imagenet": imagenet.BENCHMARK,
}


def read(name: str, root: Path, seed: int) -> Reading:
    """The data set in this folder, in its official layout or as a CoOp split in it says. `seed` draws the splits that
    the release does not have. Raises LayoutError."""
    benchmark = READERS[name]
    split_file = coop.find(root) if root.is_dir() else None
    reading = benchmark.read(root, seed) if split_file is None else coop.read(split_file, benchmark.images_in)
    check(reading, benchmark.title)
    return reading


__all__ = ["READERS", "Benchmark", "LayoutError", "Reading", "read"]
