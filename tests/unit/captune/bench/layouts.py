"""Small trees in the layouts in which the data sets are distributed: real MATLAB files, CIFAR records and PPMs."""

import json
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture(seed: int, size: int = 8, kind: str = "JPEG") -> bytes:
    """Noise, so that no two are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def put(root: Path, path: str, seed: int | None = None, kind: str = "JPEG") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(picture(zlib.crc32(path.encode()) if seed is None else seed, kind=kind))


def text(root: Path, path: str, lines: list[str]) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def dtd(root: Path) -> None:
    names = {"train": range(1, 5), "val": range(5, 7), "test": range(7, 10)}
    for split, numbers in names.items():
        listed = [f"{c}/{c}_{n:04d}.jpg" for c in ("banded", "chequered", "zigzagged") for n in numbers]
        text(root, f"labels/{split}1.txt", listed)
        text(root, f"labels/{split}2.txt", ["banded/banded_9999.jpg"])  # another of the ten splits, not to be read
        for path in listed:
            put(root, f"images/{path}")


def flowers102(root: Path) -> None:
    labels = np.array([[1, 1, 1, 77, 77, 77, 102, 102, 102, 102]])
    parts = {"trnid": [[1, 4, 7]], "valid": [[2, 5, 8]], "tstid": [[3, 6, 9, 10]]}
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": labels})
    savemat(root / "setid.mat", {name: np.array(ids) for name, ids in parts.items()})
    for number in range(1, 11):
        put(root, f"jpg/image_{number:05d}.jpg")


def oxford_pet(root: Path) -> None:
    head = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    breeds = ("Abyssinian", "american_bulldog")
    for name, numbers in (("trainval", range(1, 11)), ("test", range(100, 104))):
        text(
            root,
            f"annotations/{name}.txt",
            (head if name == "trainval" else [])
            + [f"{b}_{n} {i} 1 1" for i, b in enumerate(breeds, 1) for n in numbers],
        )
        for breed in breeds:
            for n in numbers:
                put(root, f"images/{breed}_{n}.jpg")


def eurosat(root: Path) -> None:
    from captune.bench.readers.eurosat import NAMES

    for folder in NAMES:
        for n in range(1, 11):
            put(root, f"2750/{folder}/{folder}_{n}.jpg")


def caltech101(root: Path) -> None:
    for folder in ("BACKGROUND_Google", "Faces", "Faces_easy", "accordion", "airplanes"):
        for n in range(1, 11):
            put(root, f"101_ObjectCategories/{folder}/image_{n:04d}.jpg")


def cub(root: Path) -> None:
    base = root / "CUB_200_2011"
    species = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    files = [f"{name}/{name[4:]}_{n:04d}.jpg" for name in species for n in range(10)]
    text(base, "classes.txt", [f"{i} {name}" for i, name in enumerate(species, 1)])
    text(base, "images.txt", [f"{i} {path}" for i, path in enumerate(files, 1)])
    text(base, "image_class_labels.txt", [f"{i} {1 if i <= 10 else 2}" for i in range(1, 21)])
    text(base, "train_test_split.txt", [f"{i} {i % 2}" for i in range(1, 21)])
    for path in files:
        put(base, f"images/{path}")


def cars(root: Path) -> None:
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    record = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]

    def annotations(count: int) -> np.ndarray:
        rows = [(1, 1 + n % 2, f"{n + 1:05d}.jpg") for n in range(count)]
        return np.array([rows], dtype=record)

    (root / "devkit").mkdir(parents=True, exist_ok=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    savemat(root / "devkit/cars_train_annos.mat", {"annotations": annotations(10)})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": annotations(4)})
    for folder, count in (("cars_train", 10), ("cars_test", 4)):
        for n in range(count):
            put(root, f"{folder}/{n + 1:05d}.jpg")


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    number = 1000000
    for split in ("train", "val", "test"):
        lines = []
        for variant in ("707-320", "Boeing 717", "F/A-18"):
            for _ in range(2):
                number += 1
                lines.append(f"{number} {variant}")
                put(base, f"images/{number}.jpg")
        text(base, f"images_variant_{split}.txt", lines)


def gtsrb(root: Path, tracks: int = 4, frames: int = 3) -> None:
    base = root / "GTSRB"
    columns = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    for label in (0, 14):
        names = [f"{t:05d}_{f:05d}.ppm" for t in range(tracks) for f in range(frames)]
        folder = f"Final_Training/Images/{label:05d}"
        text(base, f"{folder}/GT-{label:05d}.csv", [columns, *(f"{n};8;8;1;1;7;7;{label}" for n in names)])
        for name in names:
            put(base, f"{folder}/{name}", kind="PPM")
    tests = [(f"{n:05d}.ppm", 14 if n % 2 else 0) for n in range(4)]
    text(base, "Final_Test/Images/GT-final_test.csv", [columns, *(f"{n};8;8;1;1;7;7;{c}" for n, c in tests)])
    for name, _ in tests:
        put(base, f"Final_Test/Images/{name}", kind="PPM")


def food101(root: Path) -> None:
    base = root / "food-101"
    for split, numbers in (("train", range(20)), ("test", range(50, 55))):
        listed = [f"{dish}/{n}" for dish in ("apple_pie", "waffles") for n in numbers]
        text(base, f"meta/{split}.txt", listed)
        for path in listed:
            put(base, f"images/{path}.jpg")


def _records(labels: list[bytes], seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return b"".join(label + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def cifar10(root: Path) -> None:
    base = root / "cifar-10-batches-bin"
    text(base, "batches.meta.txt", [*CIFAR10_NAMES, ""])
    for n in range(1, 6):
        (base / f"data_batch_{n}.bin").write_bytes(_records([bytes([i % 10]) for i in range(40)], n))
    (base / "test_batch.bin").write_bytes(_records([bytes([i % 10]) for i in range(20)], 9))


def cifar100(root: Path) -> None:
    base = root / "cifar-100-binary"
    names = ["apple", "aquarium_fish", *(f"thing_{i}" for i in range(2, 100))]
    text(base, "fine_label_names.txt", names)
    (base / "train.bin").write_bytes(_records([bytes([i % 20, i % 100]) for i in range(300)], 1))
    (base / "test.bin").write_bytes(_records([bytes([i % 20, i % 100]) for i in range(100)], 2))


WNIDS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane",
    "n02113186": "Cardigan, Cardigan Welsh corgi",
    "n02963159": "cardigan",
}


def imagenet(root: Path) -> None:
    """The Kaggle release: a flat val."""
    base = root / "ILSVRC/Data/CLS-LOC"
    text(root, "LOC_synset_mapping.txt", [f"{wnid} {words}" for wnid, words in WNIDS.items()])
    solution = ["ImageId,PredictionString"]
    for place, wnid in enumerate(WNIDS):
        for n in range(30):
            put(base, f"train/{wnid}/{wnid}_{n}.JPEG")
        for n in range(2):
            number = 1 + place * 2 + n
            put(base, f"val/ILSVRC2012_val_{number:08d}.JPEG")
            solution.append(f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    text(root, "LOC_val_solution.csv", solution)


def coop(root: Path, images: str, name: str = "split_zhou_Any.json") -> dict[str, list[tuple[str, int, str]]]:
    splits: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for split, numbers in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 9))):
        for label, called in enumerate(("annual crop land", "river")):
            for n in numbers:
                path = f"Folder{label}/{n}.jpg"
                splits[split].append((path, label, called))
                put(root, f"{images}/{path}")
    (root / name).write_text(json.dumps(splits))
    return splits


BUILD: dict[str, Callable[[Path], None]] = {
    "dtd": dtd,
    "flowers102": flowers102,
    "oxford_pet": oxford_pet,
    "eurosat": eurosat,
    "caltech101": caltech101,
    "cub": cub,
    "cars": cars,
    "aircraft": aircraft,
    "gtsrb": gtsrb,
    "food101": food101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
}
