"""German Traffic Sign Recognition Benchmark (Stallkamp et al., 2012): 39,209 train and 12,630 test images of 43 signs.

Train comes in tracks: about 30 pictures each of one physical sign, taken while driving up to it. A track is train or
val as a whole; else val would show pictures that are almost those trained on."""

from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, Reading
from captune.bench.files import Release, drop_missing
from captune.bench.splits import hold_out

TITLE: Final = "GTSRB"
ARCHIVES: Final = (
    "GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip (GT-final_test.csv)"
)
TRAIN: Final = "Final_Training/Images"
TEST: Final = "Final_Test/Images"

# The release numbers its classes from 0; these names are ours, after what the signs mean.
NAMES: Final = (
    "speed limit 20 km/h", "speed limit 30 km/h", "speed limit 50 km/h", "speed limit 60 km/h", "speed limit 70 km/h",
    "speed limit 80 km/h", "end of speed limit 80 km/h", "speed limit 100 km/h", "speed limit 120 km/h",
    "no passing", "no passing for trucks", "right of way at the next intersection", "priority road", "yield", "stop",
    "no vehicles", "no trucks", "no entry", "general danger", "dangerous curve to the left",
    "dangerous curve to the right", "double curve", "bumpy road", "slippery road", "road narrows on the right",
    "road work", "traffic lights", "pedestrians", "children crossing", "bicycles crossing", "ice or snow",
    "wild animals crossing", "end of all speed and passing limits", "turn right ahead", "turn left ahead",
    "ahead only", "go straight or right", "go straight or left", "keep right", "keep left", "roundabout",
    "end of no passing", "end of no passing for trucks",
)  # fmt: skip


def read(root: Path, seed: int) -> Reading:
    """`Final_Training/Images/000<class>/<track>_<frame>.ppm` with `GT-000<class>.csv`, `Final_Test/Images/<n>.ppm` with
    `GT-final_test.csv`: `Filename;…;ClassId`, whose archive has no folder: it may lie beside `GTSRB/`, too."""
    release = Release(root, TRAIN, title=TITLE, archives=ARCHIVES, folders=("GTSRB",))
    reading = Reading(release.root)
    for folder in release.folders(TRAIN):
        name = f"{TRAIN}/{folder.name}"
        reading.entries += [
            Entry(f"{name}/{file}", label, "train") for file, label in _truth(release, f"{name}/GT-{folder.name}.csv")
        ]
    beside = ("../GT-final_test.csv",) if release.root != root else ()
    truth = release.need(f"{TEST}/GT-final_test.csv", "GT-final_test.csv", *beside)
    file = truth.relative_to(release.root).as_posix()
    reading.entries += [Entry(f"{TEST}/{name}", label, "test") for name, label in _truth(release, file)]
    drop_missing(reading)
    hold_out(reading, seed, unit=track)
    reading.notes.append("train and val are divided by track, never within one; class names are ours")
    return reading


def track(entry: Entry) -> str:
    """`…/00003_00029.ppm` -> `00003`, which tells tracks of one class apart."""
    return entry.path.rsplit("/", 1)[-1].partition("_")[0]


def _truth(release: Release, name: str) -> list[tuple[str, str]]:
    found = []
    for row in release.table(name, ";", ("Filename", "ClassId")):
        number = row["ClassId"].strip()
        if not (number.isascii() and number.isdigit() and int(number) < len(NAMES)):
            raise release.broken(name, row["ClassId"], f"a ClassId of 0 to {len(NAMES) - 1}")
        found.append((row["Filename"].strip(), NAMES[int(number)]))
    return found


BENCHMARK: Final = Benchmark(
    TITLE, "traffic signs", ARCHIVES, read, paper=99.08, images=51839, test=12630, images_in=("", "GTSRB")
)
