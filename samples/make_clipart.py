"""Make the sample data set `samples/clipart/` from the Open Clip Art Library as Debian packages it.

    python samples/make_clipart.py [SOURCE_DIR] [--out samples/clipart]

SOURCE_DIR is where `openclipart-png` (Debian 1:0.18+dfsg-19) puts its pictures. Which picture belongs to which class
was decided by eye and stands in `clipart_selection.csv`; everything else follows from it, so that two runs with the
same Pillow write the same bytes. The pictures are in the public domain; `SOURCES.csv` tells for every file
where it comes from, who drew it, and the checksums of the original and of the file made from it.
"""

import argparse
import csv
import hashlib
import io
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

HERE = Path(__file__).parent
SOURCE_DIR = Path("/usr/share/openclipart/png")
PACKAGE = "openclipart-png 1:0.18+dfsg-19"
LICENCE = "Creative Commons Public Domain Dedication"

LONG_SIDE = 160
MARGIN = 0.03  # of the long side, left around the drawing after the trim
NEARLY_WHITE = 10  # a pixel darker than 255 - this belongs to the drawing
TEST_SHARE = 0.4
HASH_SIDE = 16
SAME_PICTURE = 56  # of 512 bits: recoloured or slightly changed copies are below, other drawings above 60
MAX_PIXELS = 40_000_000

COLUMNS = ("file", "class", "split", "package", "source", "title", "author", "licence", "source_sha256", "sha256")


class SelectionError(Exception):
    """The selection file and the source directory don't make a sound data set; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One row of the selection file: the picture's path under the source directory, its class, title and author."""

    source: str
    label: str
    title: str
    author: str


@dataclass(frozen=True)
class Picture:
    """A prepared picture: the encoded file, and the hash that near-duplicates share but for a few bits."""

    entry: Entry
    data: bytes
    fingerprint: int
    source_sha256: str


def read_selection(path: Path) -> list[Entry]:
    """The rows of the selection file (columns source, class, title, author), in the file's order."""
    with path.open(newline="", encoding="utf-8") as file:
        entries = [Entry(row["source"], row["class"], row["title"], row["author"]) for row in csv.DictReader(file)]
    twice = [source for source, count in Counter(entry.source for entry in entries).items() if count > 1]
    if twice:
        raise SelectionError(f"{path.name} lists {twice[0]} more than once; a picture has one class")
    return entries


def flatten(image: Image.Image) -> Image.Image:
    """The picture on white, its empty border cut down to a small margin, at most 160 px long. Never enlarged."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    flat = white.convert("RGB")
    ink = ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).convert("L")
    box = ink.point([255 if level > NEARLY_WHITE else 0 for level in range(256)]).getbbox()
    if box is None:
        raise SelectionError("the picture is blank")
    drawing = flat.crop(box)
    room = round(LONG_SIDE * (1 - 2 * MARGIN))
    drawing.thumbnail((room, room), Image.Resampling.LANCZOS)
    return ImageOps.expand(drawing, round(max(drawing.size) * MARGIN), "white")


def dhash(image: Image.Image) -> int:
    """512 bits: whether each of 16 x 16 cells is brighter than its right, and than its lower, neighbour.

    Stretched to the grid, so a thin drawing fills it too. A small step is needed to set a bit: flat areas, most of a
    drawing, then read 0 whatever the encoder did to them. Difference hash after N. Krawetz, "Kind of Like That" (2013).
    """
    cells = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE + 1), Image.Resampling.BOX).tobytes()
    width, bits = HASH_SIDE + 1, 0
    for row in range(HASH_SIDE):
        for column in range(HASH_SIDE):
            here = row * width + column
            bits = bits << 1 | (cells[here] > cells[here + 1] + 4)
            bits = bits << 1 | (cells[here] > cells[here + width] + 4)
    return bits


def distance(left: int, right: int) -> int:
    """How many of two hashes' bits differ."""
    return (left ^ right).bit_count()


def encode(image: Image.Image) -> bytes:
    """The picture as WebP: lossless where that is smaller, as for silhouettes, else without a visible trace.

    On these drawings WebP is always smaller than PNG and than a JPEG of the same quality.
    """
    files = []
    for lossless, quality in ((True, 75), (False, 92)):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=lossless, quality=quality, method=4)
        files.append(buffer.getvalue())
    return min(files, key=len)


def prepare(source_dir: Path, entry: Entry) -> Picture:
    """Read one source picture and make the sample of it."""
    path = source_dir / entry.source
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise SelectionError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
            flat = flatten(image)
    except (OSError, Image.DecompressionBombError, SelectionError) as error:
        raise SelectionError(f"{entry.source}: {error}") from error
    return Picture(entry, encode(flat), dhash(flat), hashlib.sha256(path.read_bytes()).hexdigest())


def refuse_near_duplicates(pictures: Sequence[Picture]) -> None:
    """Raise on any two pictures, of whatever class, that are the same drawing but for colour or a detail."""
    found = [
        f"{one.entry.source} and {other.entry.source} ({distance(one.fingerprint, other.fingerprint)} bits)"
        for index, one in enumerate(pictures)
        for other in pictures[index + 1 :]
        if distance(one.fingerprint, other.fingerprint) <= SAME_PICTURE
    ]
    if found:
        raise SelectionError("near-duplicates; take one of each pair out of the selection:\n  " + "\n  ".join(found))


def split(pictures: Sequence[Picture]) -> dict[str, str]:
    """Source path to "train" or "test", 60 to 40, for the pictures of one class.

    The sources' checksums decide: arbitrary, but the same on every machine.
    """
    ordered = sorted(pictures, key=lambda picture: picture.source_sha256)
    test = round(len(ordered) * TEST_SHARE)
    return {picture.entry.source: "test" if index < test else "train" for index, picture in enumerate(ordered)}


def make(source_dir: Path, selection: Path, out: Path, sources: Path) -> Counter[tuple[str, str]]:
    """Write the data set to `out` and its provenance to `sources`; returns (class, split) counts.

    Replaces `out`'s train and test folders and touches nothing else in it. Raises SelectionError, before anything is
    written, when a picture is missing, unreadable, blank or in there twice.
    """
    pictures = [prepare(source_dir, entry) for entry in read_selection(selection)]
    refuse_near_duplicates(pictures)
    splits: dict[str, str] = {}
    for label in sorted({picture.entry.label for picture in pictures}):
        splits |= split([picture for picture in pictures if picture.entry.label == label])

    rows: dict[str, dict[str, str]] = {}
    files: dict[str, bytes] = {}
    for picture in pictures:
        entry, side = picture.entry, splits[picture.entry.source]
        name = f"{side}/{entry.label}/{Path(entry.source).stem}.webp"
        if name in files:
            raise SelectionError(f"{entry.source} and {rows[name]['source']} would both be written to {name}")
        values = (name, entry.label, side, PACKAGE, entry.source, entry.title, entry.author, LICENCE)
        checksums = (picture.source_sha256, hashlib.sha256(picture.data).hexdigest())
        rows[name] = dict(zip(COLUMNS, values + checksums, strict=True))
        files[name] = picture.data

    for side in ("train", "test"):
        shutil.rmtree(out / side, ignore_errors=True)
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    with sources.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    return Counter((row["class"], row["split"]) for row in rows.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data set and print what is in it; 1 when the selection is not sound."""
    parser = argparse.ArgumentParser(description="Make samples/clipart from Debian's openclipart-png.")
    parser.add_argument("source_dir", nargs="?", type=Path, default=SOURCE_DIR)
    parser.add_argument("--selection", type=Path, default=HERE / "clipart_selection.csv")
    parser.add_argument("--out", type=Path, default=HERE / "clipart")
    parser.add_argument("--sources", type=Path, default=HERE / "SOURCES.csv")
    chosen = parser.parse_args(arguments)
    if not chosen.source_dir.is_dir():
        print(f"{chosen.source_dir} is not there; install Debian's openclipart-png or name its folder", file=sys.stderr)
        return 1
    try:
        counts = make(chosen.source_dir, chosen.selection, chosen.out, chosen.sources)
    except SelectionError as error:
        print(error, file=sys.stderr)
        return 1
    for label in sorted({label for label, _ in counts}):
        print(f"{label:20} {counts[label, 'train']:3} train {counts[label, 'test']:3} test")
    size = sum(path.stat().st_size for path in chosen.out.rglob("*") if path.is_file())
    print(f"{counts.total()} pictures, {size / 1e6:.2f} MB in {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
