"""The committed sample data set is sound, and the script that made it keeps it so."""

import csv
import hashlib
import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

SAMPLES = Path(__file__).parents[3] / "samples"
CLIPART = SAMPLES / "clipart"
FILES = sorted(path for path in CLIPART.rglob("*") if path.is_file())
NAMES = [path.relative_to(CLIPART).as_posix() for path in FILES]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_clipart", SAMPLES / "make_clipart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _script()


def _rows(name: str) -> list[dict[str, str]]:
    with (SAMPLES / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The committed files


def test_every_picture_opens_and_is_small_but_not_tiny_nor_blank() -> None:
    for path in FILES:
        with Image.open(path) as image:
            image.load()
            assert image.mode == "RGB", path
            assert 60 <= max(image.size) <= 160, path
            levels = image.convert("L").tobytes()
            assert max(levels) - min(levels) > 50, path


def test_classes_are_plain_and_each_has_forty_pictures_or_more_and_both_splits() -> None:
    counts = Counter(tuple(name.split("/")[:2]) for name in NAMES)
    labels = {label for _, label in counts}
    assert 10 <= len(labels) <= 12
    for label in labels:
        assert label.replace("_", "").isalpha()
        assert label == label.lower()
        assert counts["train", label] >= 24
        assert counts["test", label] >= 16
        assert counts["train", label] + counts["test", label] >= 40
    assert {split for split, _ in counts} == {"train", "test"}


def test_all_of_it_is_below_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in FILES) < 4_000_000


def test_every_file_has_its_provenance_and_every_provenance_its_file() -> None:
    rows = _rows("SOURCES.csv")
    assert [row["file"] for row in rows] == NAMES
    for row, path in zip(rows, FILES, strict=True):
        assert (row["split"], row["class"]) == path.parts[-3:-1]
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), path
        assert "Public Domain" in row["licence"]
        assert row["package"].startswith("openclipart-png ")
        assert row["source"].endswith(".png")
        assert row["author"]
        assert row["title"]
        assert len(row["source_sha256"]) == 64


def test_selection_and_provenance_name_the_same_pictures() -> None:
    columns = ("source", "class", "title", "author")
    selected, made = (
        sorted(tuple(row[column] for column in columns) for row in _rows(name))
        for name in ("clipart_selection.csv", "SOURCES.csv")
    )
    assert selected == made


def test_no_picture_is_there_twice_not_even_recoloured() -> None:
    prints = []
    for path in FILES:
        with Image.open(path) as image:
            prints.append(script.dhash(image))
    close = [
        (NAMES[left], NAMES[right])
        for left in range(len(prints))
        for right in range(left + 1, len(prints))
        if (prints[left] ^ prints[right]).bit_count() <= script.SAME_PICTURE
    ]
    assert close == []


# The script


def _drawing(kind: int, colour: str = "navy", scale: float = 1.0) -> Image.Image:
    """A dozen boxes whose places depend on `kind`, on a transparent page with a wide empty border."""
    places = random.Random(kind)
    image = Image.new("RGBA", (round(400 * scale), round(300 * scale)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = places.randrange(50, 300), places.randrange(40, 220)
        right, bottom = left + places.randrange(15, 60), top + places.randrange(15, 50)
        draw.rectangle([round(edge * scale) for edge in (left, top, right, bottom)], fill=colour)
    return image


def _source(folder: Path, **pictures: Image.Image) -> Path:
    """A source directory with a selection file that puts the pictures into two classes by turns."""
    folder.mkdir()
    lines = ["source,class,title,author"]
    for index, (name, image) in enumerate(pictures.items()):
        image.save(folder / f"{name}.png")
        lines.append(f"{name}.png,{('kite', 'lamp')[index % 2]},A {name},Ann")
    (folder / "selection.csv").write_text("\n".join(lines) + "\n")
    return folder


def _run(source: Path, out: Path) -> int:
    selection, sources = str(source / "selection.csv"), str(out) + "-sources.csv"
    status = script.main([str(source), "--selection", selection, "--out", str(out), "--sources", sources])
    assert isinstance(status, int)
    return status


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_write_the_same_bytes_and_leave_other_files_alone(tmp_path: Path) -> None:
    source = _source(tmp_path / "source", **{f"p{kind}": _drawing(kind) for kind in range(10)})
    assert _run(source, tmp_path / "one") == 0
    (tmp_path / "two" / "train" / "kite").mkdir(parents=True)
    (tmp_path / "two" / "train" / "kite" / "stale.webp").write_bytes(b"from an earlier selection")
    (tmp_path / "two" / "mine.txt").write_text("keep")
    assert _run(source, tmp_path / "two") == 0
    first, second = _tree(tmp_path / "one"), _tree(tmp_path / "two")
    assert second.pop("mine.txt") == b"keep"
    assert first == second
    assert Counter(name.split("/")[0] for name in first) == {"train": 6, "test": 4}
    assert (tmp_path / "one-sources.csv").read_bytes() == (tmp_path / "two-sources.csv").read_bytes()


def test_a_recoloured_copy_in_another_class_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(tmp_path / "source", a=_drawing(1), b=_drawing(1, "green", 0.6), c=_drawing(2))
    assert _run(source, tmp_path / "out") == 1
    assert "a.png and b.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["blank", "missing", "broken", "twice"])
def test_an_unsound_picture_is_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _source(tmp_path / "source", good=_drawing(1), bad=_drawing(2))
    if case == "blank":
        Image.new("RGBA", (90, 90)).save(source / "bad.png")
    elif case == "missing":
        (source / "bad.png").unlink()
    elif case == "broken":
        (source / "bad.png").write_bytes((source / "bad.png").read_bytes()[:60])
    else:
        with (source / "selection.csv").open("a") as file:
            file.write("bad.png,lamp,A bad,Ann\n")
    assert _run(source, tmp_path / "out") == 1
    assert "bad.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flatten_puts_on_white_trims_shrinks_and_keeps_proportions() -> None:
    image = Image.new("RGBA", (1000, 600))
    ImageDraw.Draw(image).rectangle((100, 100, 899, 299), fill=(0, 0, 128, 128))
    flat = script.flatten(image)
    assert flat.mode == "RGB"
    assert 150 <= flat.width <= 160
    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((flat.width // 2, flat.height // 2)) == pytest.approx((127, 127, 191), abs=1)
    ink = [(x, y) for x in range(flat.width) for y in range(flat.height) if flat.getpixel((x, y)) != (255, 255, 255)]
    across, down = (1 + max(axis) - min(axis) for axis in zip(*ink, strict=True))
    assert across / down == pytest.approx(4, rel=0.05)


def test_flatten_never_enlarges() -> None:
    image = Image.new("RGB", (50, 40), "white")
    ImageDraw.Draw(image).rectangle((10, 10, 29, 19), fill="red")
    assert max(script.flatten(image).size) <= 24


@given(st.integers(0, 30), st.sampled_from(["red", "green", "black", "purple"]), st.floats(0.7, 2.0))
def test_colour_and_size_hardly_change_the_hash(kind: int, colour: str, scale: float) -> None:
    plain, changed = (script.dhash(script.flatten(image)) for image in (_drawing(kind), _drawing(kind, colour, scale)))
    assert (plain ^ changed).bit_count() <= script.SAME_PICTURE


def test_different_drawings_have_different_hashes() -> None:
    prints = [script.dhash(script.flatten(_drawing(kind))) for kind in range(10)]
    pairs = [(left ^ right).bit_count() for left in prints for right in prints if left is not right]
    assert min(pairs) > script.SAME_PICTURE
