"""Every reader on a small tree in the layout in which its data set is distributed."""

import builtins
import shutil
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from captune.bench import READERS, LayoutError, read
from captune.bench.data import Reading, spoken
from captune.bench.readers import flowers102, gtsrb, imagenet
from tests.unit.captune.bench.layouts import BUILD, CIFAR10_NAMES, WNIDS, picture, put, text


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Path]:
    def build(name: str) -> Path:
        BUILD[name](tmp_path)
        return tmp_path

    return build


def sizes(reading: Reading) -> dict[str, int]:
    return {split: sum(counts.values()) for split, counts in reading.counts().items()}


def paths(reading: Reading, split: str) -> set[str]:
    return {entry.path for entry in reading.entries if entry.split == split}


def test_every_data_set_of_the_paper_has_a_reader() -> None:
    assert len(READERS) == 13
    assert READERS.keys() == BUILD.keys()


@pytest.mark.parametrize("name", READERS)
def test_every_image_is_read_once_and_every_class_is_in_train(name: str, built: Callable[[str], Path]) -> None:
    reading = read(name, built(name), 0)
    assert not reading.refused
    assert len({entry.path for entry in reading.entries}) == len(reading.entries)
    counts = reading.counts()
    assert set(counts["train"]) == set(reading.classes) >= set(counts["val"]) | set(counts["test"])
    assert counts["val"]
    assert counts["test"]
    for entry in reading.entries[::7]:
        Image.open(BytesIO(entry.content(reading.root))).load()


@pytest.mark.parametrize("name", READERS)
def test_reading_twice_gives_the_same(name: str, built: Callable[[str], Path]) -> None:
    root = built(name)
    assert read(name, root, 3).entries == read(name, root, 3).entries


@pytest.mark.parametrize("name", READERS)
def test_another_split_seed_never_moves_a_test_image_of_the_release(name: str, built: Callable[[str], Path]) -> None:
    root = built(name)
    first, second = read(name, root, 0), read(name, root, 1)
    assert first.official == (name not in ("eurosat", "caltech101"))
    if first.official:
        assert paths(first, "test") == paths(second, "test")
    else:
        assert paths(first, "test") != paths(second, "test")


@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder_is_refused_by_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as refused:
        read(name, tmp_path, 0)
    assert READERS[name].title in str(refused.value)
    assert READERS[name].archives in str(refused.value)
    with pytest.raises(LayoutError, match="is no folder"):
        read(name, tmp_path / "nowhere", 0)


NEEDED = {
    "dtd": "labels/val1.txt", "flowers102": "setid.mat", "oxford_pet": "annotations/test.txt",
    "eurosat": "2750/River", "cub": "CUB_200_2011/train_test_split.txt", "cars": "cars_test_annos_withlabels.mat",
    "aircraft": "fgvc-aircraft-2013b/data/images_variant_val.txt",
    "gtsrb": "GTSRB/Final_Test/Images/GT-final_test.csv", "food101": "food-101/meta/test.txt",
    "cifar10": "cifar-10-batches-bin/data_batch_4.bin", "cifar100": "cifar-100-binary/fine_label_names.txt",
    "imagenet": "LOC_synset_mapping.txt",
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_refused_by_its_name_and_its_archive(name: str, built: Callable[[str], Path]) -> None:
    root = built(name)
    gone = root / NEEDED[name]
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(LayoutError) as refused:
        read(name, root, 0)
    assert gone.name in str(refused.value)
    assert READERS[name].archives in str(refused.value)
    assert "http" not in str(refused.value)


def test_an_image_that_is_listed_but_not_there_is_refused_alone(built: Callable[[str], Path]) -> None:
    root = built("dtd")
    (root / "images/banded/banded_0008.jpg").unlink()
    reading = read("dtd", root, 0)
    assert [path for path, _ in reading.refused] == ["images/banded/banded_0008.jpg"]
    assert "test" in reading.refused[0][1]
    assert sizes(reading) == {"train": 12, "val": 6, "test": 8}


def test_a_list_that_climbs_out_of_the_folder_reads_nothing_there(tmp_path: Path) -> None:
    root = tmp_path / "dtd"
    BUILD["dtd"](root)
    put(tmp_path, "secret/secret.jpg")
    with (root / "labels/train1.txt").open("a") as listed:
        listed.write("banded/../../../secret/secret.jpg\n")
    reading = read("dtd", root, 0)
    assert [path for path, _ in reading.refused] == ["images/banded/../../../secret/secret.jpg"]


# -- one by one --------------------------------------------------------------------------------------------------------


def test_dtd_takes_split_1(built: Callable[[str], Path]) -> None:
    reading = read("dtd", built("dtd"), 0)
    assert sizes(reading) == {"train": 12, "val": 6, "test": 9}
    assert reading.classes == ["banded", "chequered", "zigzagged"]
    assert "images/banded/banded_0005.jpg" in paths(reading, "val")


def test_flowers_has_the_official_val_and_names(built: Callable[[str], Path]) -> None:
    reading = read("flowers102", built("flowers102"), 0)
    assert reading.counts() == {
        "train": {"blackberry lily": 1, "passion flower": 1, "pink primrose": 1},
        "val": {"blackberry lily": 1, "passion flower": 1, "pink primrose": 1},
        "test": {"blackberry lily": 2, "passion flower": 1, "pink primrose": 1},
    }
    assert paths(reading, "val") == {f"jpg/image_{n:05d}.jpg" for n in (2, 5, 8)}


def test_flowers_with_a_label_that_is_none(built: Callable[[str], Path]) -> None:
    root = built("flowers102")
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 103]])})
    with pytest.raises(LayoutError, match="label 103"):
        read("flowers102", root, 0)


def test_a_matlab_file_that_is_none_or_another(built: Callable[[str], Path]) -> None:
    root = built("flowers102")
    savemat(root / "setid.mat", {"other": np.array([1])})
    with pytest.raises(LayoutError, match="holds no 'trnid'"):
        read("flowers102", root, 0)
    (root / "setid.mat").write_bytes(b"not MATLAB at all" * 20)
    with pytest.raises(LayoutError, match=r"setid\.mat is no MATLAB v5 file"):
        read("flowers102", root, 0)


def test_without_scipy_the_extra_is_named(built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LayoutError, match=r"captune\[bench\]"):
        read("flowers102", built("flowers102"), 0)


def test_pets_are_named_by_their_files(built: Callable[[str], Path]) -> None:
    reading = read("oxford_pet", built("oxford_pet"), 0)
    assert reading.counts() == {
        "train": {"Abyssinian": 8, "american_bulldog": 8},
        "val": {"Abyssinian": 2, "american_bulldog": 2},
        "test": {"Abyssinian": 4, "american_bulldog": 4},
    }
    assert "drawn with seed 0" in reading.notes[0]


def test_eurosat_says_that_its_splits_are_drawn(built: Callable[[str], Path]) -> None:
    reading = read("eurosat", built("eurosat"), 5)
    assert set(map(tuple, (c.values() for c in reading.counts().values()))) == {(5,) * 10, (2,) * 10, (3,) * 10}
    assert "Annual Crop Land" in reading.classes
    assert "seed 5" in reading.notes[0]
    assert "not those of any paper" in reading.notes[0]


def test_caltech_leaves_out_the_background(built: Callable[[str], Path]) -> None:
    assert read("caltech101", built("caltech101"), 0).classes == ["accordion", "airplane", "face"]


def test_cub_follows_its_lists(built: Callable[[str], Path]) -> None:
    root = built("cub")
    reading = read("cub", root, 0)
    assert reading.classes == ["Black_footed_Albatross", "Laysan_Albatross"]
    assert sizes(reading) == {"train": 8, "val": 2, "test": 10}
    text(root / "CUB_200_2011", "image_class_labels.txt", ["1 1"])
    with pytest.raises(LayoutError, match=r"image 2 .* has no class"):
        read("cub", root, 0)


def test_cars_are_named_as_in_the_devkit(built: Callable[[str], Path]) -> None:
    reading = read("cars", built("cars"), 0)
    assert reading.classes == ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]
    assert {e.path: e.label for e in reading.entries}["cars_test/00002.jpg"] == "Ram C/V Cargo Van Minivan 2012"
    assert sizes(reading) == {"train": 8, "val": 2, "test": 4}


def test_cars_test_list_without_labels_is_of_no_use(built: Callable[[str], Path]) -> None:
    root = built("cars")
    rows = np.array([[(1, "00001.jpg"), (1, "00002.jpg")]], dtype=[("bbox_x1", "O"), ("fname", "O")])
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": rows})
    with pytest.raises(LayoutError, match="no 'class'"):
        read("cars", root, 0)


def test_aircraft_variants_of_several_words(built: Callable[[str], Path]) -> None:
    reading = read("aircraft", built("aircraft"), 0)
    assert reading.classes == ["707-320", "Boeing 717", "F/A-18"]
    assert sizes(reading) == {"train": 6, "val": 6, "test": 6}


def test_food_names_and_sides(built: Callable[[str], Path]) -> None:
    reading = read("food101", built("food101"), 0)
    assert reading.counts()["val"] == {"apple_pie": 2, "waffles": 2}
    assert paths(reading, "test") == {f"images/{d}/{n}.jpg" for d in ("apple_pie", "waffles") for n in range(50, 55)}


def test_gtsrb_test_list_without_labels_is_refused(built: Callable[[str], Path]) -> None:
    root = built("gtsrb")
    text(root / "GTSRB", "Final_Test/Images/GT-final_test.csv", ["Filename;Width;Height", "00000.ppm;8;8"])
    with pytest.raises(LayoutError, match="has no column ClassId"):
        read("gtsrb", root, 0)
    text(root / "GTSRB", "Final_Test/Images/GT-final_test.csv", ["Filename;ClassId", "00000.ppm;43"])
    with pytest.raises(LayoutError, match="ClassId of 0 to 42"):
        read("gtsrb", root, 0)


def test_gtsrb_as_its_three_archives_unpack(built: Callable[[str], Path]) -> None:
    root = built("gtsrb")
    (root / "GTSRB/Final_Test/Images/GT-final_test.csv").rename(root / "GT-final_test.csv")
    assert sizes(read("gtsrb", root, 0))["test"] == 4
    with pytest.raises(LayoutError, match=r"no Final_Test/Images/GT-final_test.csv or GT-final_test.csv"):
        read("gtsrb", root / "GTSRB", 0)  # nothing is read from outside of the folder that was named


def test_gtsrb_names_by_class_id(built: Callable[[str], Path]) -> None:
    reading = read("gtsrb", built("gtsrb"), 0)
    assert reading.classes == ["speed limit 20 km/h", "stop"]
    assert {e.path: e.label for e in reading.entries}["Final_Test/Images/00001.ppm"] == "stop"


def test_cifar_pixels_are_those_of_the_record(built: Callable[[str], Path]) -> None:
    root = built("cifar10")
    reading = read("cifar10", root, 0)
    assert sizes(reading) == {"train": 180, "val": 20, "test": 20}
    records = np.fromfile(root / "cifar-10-batches-bin/data_batch_3.bin", dtype=np.uint8).reshape(-1, 3073)
    for number in (0, 39):
        label = CIFAR10_NAMES[int(records[number, 0])]
        (entry,) = [e for e in reading.entries if e.path == f"train/{label}/data_batch_3_{number:05d}.png"]
        assert entry.label == label
        found = np.asarray(Image.open(BytesIO(entry.content(reading.root))))
        np.testing.assert_array_equal(found, records[number, 1:].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_100_takes_the_fine_label(built: Callable[[str], Path]) -> None:
    reading = read("cifar100", built("cifar100"), 0)
    assert len(reading.classes) == 100
    records = np.fromfile(reading.root / "test.bin", dtype=np.uint8).reshape(-1, 3074)
    (entry,) = [e for e in reading.entries if e.path == "test/aquarium_fish/test_00001.png"]
    found = np.asarray(Image.open(BytesIO(entry.content(reading.root))))
    np.testing.assert_array_equal(found, records[1, 2:].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("name", "pickled", "binary"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1", "cifar-10-binary.tar.gz"),
        ("cifar10", "data_batch_1", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-python/train", "cifar-100-binary.tar.gz"),
    ],
)
def test_pickled_cifar_is_refused_unopened(name: str, pickled: str, binary: str, tmp_path: Path) -> None:
    put(tmp_path, pickled)  # a JPEG: reading it as anything else would be another error
    with pytest.raises(LayoutError, match="pickle") as refused:
        read(name, tmp_path, 0)
    assert binary in str(refused.value)


def test_cifar_cut_off_or_with_a_wrong_label(built: Callable[[str], Path]) -> None:
    root = built("cifar10")
    batch = root / "cifar-10-batches-bin/data_batch_2.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(LayoutError, match=r"data_batch_2\.bin is cut off"):
        read("cifar10", root, 0)
    batch.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(LayoutError, match="record 0: label 10"):
        read("cifar10", root, 0)


# -- ImageNet ----------------------------------------------------------------------------------------------------------


def test_imagenet_val_is_test_and_our_val_is_held_out_of_train(built: Callable[[str], Path]) -> None:
    reading = read("imagenet", built("imagenet"), 0)
    assert len(paths(reading, "test")) == 10
    assert all("/val/" in path for path in paths(reading, "test"))
    for other in ("train", "val"):
        assert all("/train/" in path for path in paths(reading, other))
    assert not paths(reading, "train") & paths(reading, "val")
    assert len(paths(reading, "train") | paths(reading, "val")) == 150
    assert set(reading.counts()["val"].values()) == {6}


def test_imagenet_val_per_class_has_a_limit(tmp_path: Path) -> None:
    BUILD["imagenet"](tmp_path)
    for n in range(30, 150):
        (tmp_path / f"ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_{n}.JPEG").write_bytes(picture(n))
    assert read("imagenet", tmp_path, 0).counts()["val"]["tench"] == imagenet.VAL_PER_CLASS == 20


def test_imagenet_names_are_told_apart(built: Callable[[str], Path]) -> None:
    assert read("imagenet", built("imagenet"), 0).classes == [
        "Cardigan Welsh corgi", "cardigan", "construction crane", "crane bird", "tench",
    ]  # fmt: skip


def test_a_name_is_kept_where_only_a_synonym_is_shared() -> None:
    words = {"a": "tub, vat", "b": "bathtub, bath, tub", "c": "maillot", "d": "maillot, tank suit"}
    assert imagenet.distinct(words) == {"a": "tub", "b": "bathtub", "c": "maillot", "d": "tank suit"}


def test_synsets_that_clips_names_call_alike_stay_two() -> None:
    words = {"n03773504": "missile", "n04008634": "missile", "n04355933": "sunglasses", "n04356056": "sunglasses"}
    assert list(imagenet.distinct(words).values()) == ["missile", "projectile", "sunglasses", "dark glasses"]


def test_imagenet_refuses_names_that_would_make_two_synsets_one_class(built: Callable[[str], Path]) -> None:
    root = built("imagenet")
    text(root, "classnames.txt", [f"{wnid} {'Tub' if i else 'tub'}" for i, wnid in enumerate(WNIDS)])
    with pytest.raises(LayoutError, match=r"calls both .* and .* 'Tub'"):
        read("imagenet", root, 0)


def test_imagenet_val_in_folders_and_coop_names(tmp_path: Path) -> None:
    for wnid in WNIDS:
        for n in range(10):
            put(tmp_path, f"train/{wnid}/{wnid}_{n}.JPEG")
        put(tmp_path, f"val/{wnid}/ILSVRC2012_val_{wnid}.JPEG")
    text(tmp_path, "classnames.txt", [f"{wnid} name {i}" for i, wnid in enumerate(WNIDS)])
    reading = read("imagenet", tmp_path, 0)
    assert reading.classes == [f"name {i}" for i in range(5)]
    assert sizes(reading) == {"train": 40, "val": 10, "test": 5}


def test_imagenet_of_the_devkit(tmp_path: Path) -> None:
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = [(number, wnid, words) for number, (wnid, words) in zip((3, 1, 2, 5, 4), WNIDS.items(), strict=True)]
    devkit = tmp_path / "ILSVRC2012_devkit_t12/data"
    text(devkit, imagenet.TRUTH, ["3", "1", "5"])
    savemat(devkit / "meta.mat", {"synsets": np.array([*synsets, (1001, "n00001740", "entity")], dtype=kind)})
    for wnid in WNIDS:
        for n in range(10):
            put(tmp_path, f"train/{wnid}/{wnid}_{n}.JPEG")
    for n in (1, 2, 3):
        put(tmp_path, f"val/ILSVRC2012_val_{n:08d}.JPEG")
    reading = read("imagenet", tmp_path, 0)
    assert {e.path[-6]: e.label for e in reading.entries if e.split == "test"} == {
        "1": "tench",
        "2": "crane bird",
        "3": "Cardigan Welsh corgi",
    }


def test_imagenet_flat_val_without_labels(tmp_path: Path) -> None:
    BUILD["imagenet"](tmp_path)
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(LayoutError, match=r"ground_truth\.txt .*LOC_val_solution\.csv"):
        read("imagenet", tmp_path, 0)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "count"), [(flowers102.NAMES, 102), (gtsrb.NAMES, 43)])
def test_names_that_we_give_are_complete_and_distinct(names: tuple[str, ...], count: int) -> None:
    assert len(names) == count
    assert not [name for name, uses in Counter(map(spoken, names)).items() if uses > 1]
