"""Which image a name means: matched where there is one answer, never guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.transfer.matching import Claims, Matcher, Target, stem
from shared.datasets.classes import split_of


def matcher(paths: list[str]) -> Matcher:
    """Of images in folders `split/class` or, all in train, `class`."""
    folders = {path: path.split("/")[:-1] for path in paths}
    return Matcher(Target(path, path, names[-1], split_of(names[0]) or "train") for path, names in folders.items())


def matched(name: str, paths: list[str], *, sidecar: bool = False) -> list[str]:
    return [image.path for image in matcher(paths).find(name, sidecar=sidecar).images]


FOLDERS = ["train/cat/1.png", "train/dog/1.png", "train/dog/2.jpg", "val/dog/3.jpg"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train/cat/1.png", ["train/cat/1.png"]),
        ("./train//cat/1.png", ["train/cat/1.png"]),
        ("train\\cat\\1.png", ["train/cat/1.png"]),
        ("2.jpg", ["train/dog/2.jpg"]),
        ("3.jpg", ["val/dog/3.jpg"]),
        (" 3.jpg ", ["val/dog/3.jpg"]),
        ("cat/1.png", ["train/cat/1.png"]),
        ("/data/pets/train/cat/1.png", ["train/cat/1.png"]),
        ("/elsewhere/images/2.jpg", []),
        ("1.png", ["train/cat/1.png", "train/dog/1.png"]),
        ("images/1.png", []),
        ("test/dog/2.jpg", []),
        ("bird/2.jpg", []),
        ("x/val/dog/3.jpg", ["val/dog/3.jpg"]),
        ("train/val/dog/3.jpg", []),
        ("cat/2.jpg", []),
        ("2.png", []),
        ("2", []),
        ("../../dog/2.jpg", []),
        ("../../train/dog/2.jpg", ["train/dog/2.jpg"]),
        ("", []),
    ],
)
def test_a_name_is_matched_by_path_then_by_unique_file_name(name: str, found: list[str]) -> None:
    assert matched(name, FOLDERS) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("photos/cat/1.png", ["cat/1.png"]),
        ("Training/cat/1.png", ["cat/1.png"]),
        ("test/cat/1.png", []),
        ("validation/photos/cat/1.png", []),
        ("dog/cat/1.png", []),
        ("bird/1.png", []),
        ("photos/1.png", []),
        ("1.png", ["cat/1.png"]),
    ],
)
def test_what_stands_before_an_images_path_must_name_no_other_split_and_class(name: str, found: list[str]) -> None:
    assert matched(name, ["cat/1.png", "dog/2.png"]) == found


def test_a_folder_is_the_class_also_where_images_have_none() -> None:
    images = Matcher([Target("1", "1.png", "cat", "train"), Target("2", "2.png", "dog", "train")])
    found = {name: len(images.find(name).images) for name in ("cat/1.png", "dog/1.png", "images/1.png")}
    assert found == {"cat/1.png": 1, "dog/1.png": 0, "images/1.png": 1}


@pytest.mark.parametrize(
    ("names", "served"),
    [
        (["1.png", "cat/1.png"], ["cat/1.png"]),
        (["cat/1.png", "./cat/1.png", "x/cat/1.png"], ["cat/1.png", "./cat/1.png"]),
        (["x/cat/1.png", "y/cat/1.png", "2.png"], ["2.png"]),
        (["1.png", "x/cat/1.png", "1.png"], []),
        (["1.png", " 1.png", "1.png"], ["1.png", " 1.png", "1.png"]),
        (["3.png", "1.png"], ["1.png"]),
    ],
)
def test_an_image_goes_to_its_whole_path_else_to_the_only_other_name(names: list[str], served: list[str]) -> None:
    claims = Claims(matcher(["cat/1.png", "dog/2.png"]))
    for name in names:
        claims.add(name)
    assert [name for name in names if claims.find(name)[1]] == served


def test_a_sidecar_of_the_whole_path_comes_before_one_elsewhere() -> None:
    claims = Claims(matcher(["cat/1.png", "dog/2.png"]))
    names = ["captions/cat/1.txt", "cat/1.txt", "cat/1.png.txt", "2.txt"]
    for name in names:
        claims.add(name, sidecar=True)
    assert [claims.find(name, sidecar=True)[1] for name in names] == [False, True, True, True]


def test_a_name_in_another_unicode_form_is_the_same() -> None:
    assert matched("cat/u\u0308.png", ["cat/ü.png"]) == ["cat/ü.png"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cat/1.txt", ["cat/1.png", "cat/1.jpg"]),
        ("cat/1.jpg.txt", ["cat/1.jpg"]),
        ("2.txt", ["cat/2.png"]),
        ("captions/2.txt", []),
        ("captions/cat/2.txt", ["cat/2.png"]),
        ("test/cat/2.png.txt", []),
        ("dog/2.txt", []),
        ("3.txt", ["cat/3.png", "dog/3.png"]),
        ("dog/3.txt", ["dog/3.png"]),
        ("x/dog/3.txt", ["dog/3.png"]),
        ("3.png.txt", ["cat/3.png", "dog/3.png"]),
        ("dog/3.TXT", ["dog/3.png"]),
        (".txt", []),
    ],
)
def test_a_sidecar_is_matched_by_the_path_without_extension(name: str, found: list[str]) -> None:
    images = ["cat/1.png", "cat/1.jpg", "cat/2.png", "cat/3.png", "dog/3.png"]
    assert matched(name, images, sidecar=True) == found


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\%"), min_size=1)


@given(st.lists(NAMES, min_size=1, max_size=3))
def test_a_stem_has_no_extension_and_its_folders(parts: list[str]) -> None:
    folder = "".join(f"{part}/" for part in parts)
    assert stem(f"{folder}a.b.png") == f"{folder}a.b"
    assert stem(f"{folder}a") == f"{folder}a"
    assert stem(f"{folder}.png") == f"{folder}.png"
