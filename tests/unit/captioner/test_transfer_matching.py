"""Which image a name means: matched where there is one answer, never guessed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.captioner.transfer.matching import Matcher, Target, stem


def matched(name: str, paths: list[str], *, sidecar: bool = False) -> list[str]:
    found = Matcher(Target(path, path, path.split("/")[-2]) for path in paths).find(name, sidecar=sidecar)
    return [image.path for image in found]


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
        ("/elsewhere/images/2.jpg", ["train/dog/2.jpg"]),
        ("1.png", ["train/cat/1.png", "train/dog/1.png"]),
        ("images/1.png", ["train/cat/1.png", "train/dog/1.png"]),
        ("cat/2.jpg", []),
        ("2.png", []),
        ("2", []),
        ("../../2.jpg", ["train/dog/2.jpg"]),
        ("", []),
    ],
)
def test_a_name_is_matched_by_path_then_by_unique_file_name(name: str, found: list[str]) -> None:
    assert matched(name, FOLDERS) == found


def test_a_name_in_another_unicode_form_is_the_same() -> None:
    assert matched("cat/u\u0308.png", ["cat/ü.png"]) == ["cat/ü.png"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cat/1.txt", ["cat/1.png", "cat/1.jpg"]),
        ("cat/1.jpg.txt", ["cat/1.jpg"]),
        ("2.txt", ["cat/2.png"]),
        ("captions/2.txt", ["cat/2.png"]),
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
