"""ImageNet, ILSVRC 2012 (Russakovsky et al., arXiv 1409.0575): 1,281,167 train images of 1,000 synsets. The official
val (50,000 images) is our test, as in the paper; our val is held out of train."""

from collections import Counter
from pathlib import Path
from typing import Final

from captune.bench.data import Benchmark, Entry, LayoutError, Reading, spoken
from captune.bench.files import Release, drop_missing, pictures
from captune.bench.splits import hold_out
from shared.schemas.common import Split

TITLE: Final = "ImageNet"
ARCHIVES: Final = (
    "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or the Kaggle release's "
    "ILSVRC/ with LOC_synset_mapping.txt and LOC_val_solution.csv"
)
TRAIN: Final = ("train", "ILSVRC/Data/CLS-LOC/train", "images/train")
VAL: Final = ("val", "ILSVRC/Data/CLS-LOC/val", "images/val")
NAMES: Final = ("classnames.txt", "LOC_synset_mapping.txt", "synset_words.txt")
META: Final = ("ILSVRC2012_devkit_t12/data/meta.mat", "data/meta.mat")
TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
VAL_PER_CLASS: Final = 20
# For synsets with no word of their own: the two cranes, and those that lists after CLIP's names (CoOp's) call alike.
# The others are told apart by their synonyms.
ALIKE: Final = {
    "n02012849": "crane bird",
    "n03126707": "construction crane",
    "n04008634": "projectile",  # n03773504 is the missile
    "n04356056": "dark glasses",  # n04355933 has the sunglasses
}


def read(root: Path, seed: int) -> Reading:
    """`train/<wnid>/<file>`; `val/<wnid>/<file>`, or `val/<file>` with a list of labels. Names: `<wnid> <words>` per
    line, CoOp's classnames.txt first, or the devkit's meta.mat."""
    release = Release(root, *TRAIN, title=TITLE, archives=ARCHIVES, folders=("imagenet",))
    names, by_number = _names(release)
    reading = Reading(release.root, notes=["test is the official val"])
    train = release.need(*TRAIN).relative_to(release.root).as_posix()
    _add_folders(release, reading, train, names, "train")
    val = release.need(*VAL).relative_to(release.root).as_posix()
    if release.folders(val):
        _add_folders(release, reading, val, names, "test")
    else:
        for file, wnid in _val_labels(release, val, by_number).items():
            reading.entries.append(Entry(f"{val}/{file}", _name(release, names, wnid), "test"))
        reading.entries = [entry for entry in reading.entries if entry.split == "train"] + _present(reading)
    hold_out(reading, seed, most=VAL_PER_CLASS)
    return reading


def _present(reading: Reading) -> list[Entry]:
    """The test entries whose files are there; only these were taken from a list and not from the folder."""
    tests = Reading(reading.root, [entry for entry in reading.entries if entry.split == "test"])
    drop_missing(tests)
    reading.refused += tests.refused
    return tests.entries


def _add_folders(release: Release, reading: Reading, place: str, names: dict[str, str], split: Split) -> None:
    for folder in release.folders(place):
        label = _name(release, names, folder.name)
        reading.entries += [Entry(f"{place}/{folder.name}/{file}", label, split) for file in pictures(folder)]


def _name(release: Release, names: dict[str, str], wnid: str) -> str:
    if wnid not in names:
        raise LayoutError(f"{TITLE}: {release.root}: '{wnid}' is no synset that the list of names has")
    return names[wnid]


def _names(release: Release) -> tuple[dict[str, str], dict[str, str]]:
    """Names by wnid, and wnids by the devkit's number where there is a devkit."""
    by_number, words = {}, {}
    for file in META:
        if (release.root / file).exists():
            for synset in release.field(release.mat(file), "synsets", file):
                if int(synset.ILSVRC2012_ID) <= 1000:  # the others are inner nodes
                    by_number[str(int(synset.ILSVRC2012_ID))] = str(synset.WNID)
                    words[str(synset.WNID)] = str(synset.words)
            break
    if not words or any((release.root / name).exists() for name in NAMES):
        file = release.need(*NAMES).relative_to(release.root).as_posix()
        words = {line[0]: " ".join(line[1:]) for line in release.lines(file) if len(line) > 1}
    names = distinct(words)
    first: dict[str, str] = {}
    for wnid, name in names.items():
        if (other := first.setdefault(spoken(name), wnid)) != wnid:  # they would become one class
            raise LayoutError(f"{TITLE}: {release.root}: the list of names calls both {other} and {wnid} '{name}'")
    return names, by_number


def distinct(words: dict[str, str]) -> dict[str, str]:
    """A name for each synset from its comma-separated synonyms: the first, or where another synset's first is the same
    (whatever the case), one that is not."""
    synonyms = {wnid: [word.strip() for word in text.split(",")] for wnid, text in words.items()}
    firsts = Counter(each[0].casefold() for each in synonyms.values())
    return {
        wnid: each[0]
        if firsts[each[0].casefold()] == 1
        else next((word for word in each if word.casefold() not in firsts), ALIKE.get(wnid, each[0]))
        for wnid, each in synonyms.items()
    }


def _val_labels(release: Release, val: str, by_number: dict[str, str]) -> dict[str, str]:
    """File name -> wnid of a flat val folder."""
    if (release.root / "LOC_val_solution.csv").exists():
        rows = release.table("LOC_val_solution.csv", ",", ("ImageId", "PredictionString"))
        return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
    truth = release.need(
        f"ILSVRC2012_devkit_t12/data/{TRUTH}", f"data/{TRUTH}", "LOC_val_solution.csv", f"{val}/<wnid>/"
    )
    if not by_number:
        raise release.missing("meta.mat", f", without which the numbers in {TRUTH} mean nothing")
    numbers = truth.read_text(encoding="ascii").split()
    if unknown := sorted(set(numbers) - by_number.keys()):
        raise LayoutError(f"{TITLE}: {truth} holds the label {unknown[0]}, which meta.mat does not have")
    return {f"ILSVRC2012_val_{i:08d}.JPEG": by_number[number] for i, number in enumerate(numbers, 1)}


BENCHMARK: Final = Benchmark(TITLE, "general objects", ARCHIVES, read, images=1331167, test=50000)
