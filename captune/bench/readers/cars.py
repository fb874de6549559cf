"""Stanford Cars (Krause et al., 2013): 8,144 train and 8,041 test images of 196 models."""

from pathlib import Path
from typing import Any, Final

from captune.bench.data import Benchmark, Entry, LayoutError, Reading
from captune.bench.files import Release, drop_missing
from captune.bench.splits import hold_out
from shared.schemas.common import Split

TITLE: Final = "Cars"
ARCHIVES: Final = "cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat"
META: Final = "devkit/cars_meta.mat"
SIDES: Final[tuple[tuple[Split, str, tuple[str, ...]], ...]] = (
    ("train", "cars_train", ("devkit/cars_train_annos.mat",)),
    ("test", "cars_test", ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")),
)


def read(root: Path, seed: int) -> Reading:
    """`cars_meta.mat`: `class_names`; the others: `annotations`, structs with `fname` and `class` (from 1). The
    devkit's own cars_test_annos.mat has no labels and is of no use."""
    release = Release(root, META, title=TITLE, archives=ARCHIVES, folders=("stanford_cars",))
    names = [str(name) for name in release.field(release.mat(META), "class_names", META)]
    reading = Reading(release.root)
    for split, folder, files in SIDES:
        release.need(folder)
        file = release.need(*files).relative_to(release.root).as_posix()
        for each in _listed(release.field(release.mat(file), "annotations", file)):
            number, name = getattr(each, "class", None), getattr(each, "fname", None)
            if number is None or name is None or not 1 <= int(number) <= len(names):
                raise LayoutError(f"{TITLE}: {file}: an annotation has no 'fname', or no 'class' of 1 to {len(names)}")
            reading.entries.append(Entry(f"{folder}/{name}", names[int(number) - 1], split))
    drop_missing(reading)
    hold_out(reading, seed)
    return reading


def _listed(found: Any) -> list[Any]:
    """A struct array, which SciPy squeezes to a struct where it has one element."""
    return list(found) if hasattr(found, "__len__") else [found]


BENCHMARK: Final = Benchmark(TITLE, "cars", ARCHIVES, read, paper=82.25, images=16185, test=8041)
