"""Small labelled pictures: one colour and one shape per class, no two pictures alike."""

import io
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = {"red_disc": (210, 40, 40), "green_box": (40, 170, 60), "blue_bar": (50, 70, 200)}
SIZE = 32  # pixels


def picture(class_name: str, number: int, size: int = SIZE) -> Image.Image:
    """The same picture for the same arguments, on a light, slightly different background each."""
    rng = random.Random(f"{class_name}/{number}")
    image = Image.new("RGB", (size, size), (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255)))
    draw = ImageDraw.Draw(image)
    left, top = rng.randint(2, size // 4), rng.randint(2, size // 4)
    width = rng.randint(size // 3, size // 2)
    height = width // 3 if class_name.endswith("bar") else width
    corners = (left, top, left + width, top + height)
    draw_shape = draw.ellipse if class_name.endswith("disc") else draw.rectangle
    draw_shape(corners, fill=tuple(channel + rng.randint(-25, 25) for channel in CLASSES[class_name]))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(class_name: str = "red_disc", number: int = 0) -> bytes:
    return encoded(picture(class_name, number))


def by_class(per_class: int, first: int = 0) -> dict[str, bytes]:
    """`class/file` with `per_class` pictures of each class."""
    return {f"{name}/{n:03}.png": png(name, n) for name in CLASSES for n in range(first, first + per_class)}


def by_split(train: int, val: int, test: int) -> dict[str, bytes]:
    """`split/class/file`."""
    files: dict[str, bytes] = {}
    first = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        files |= {f"{split}/{path}": data for path, data in by_class(count, first).items()}
        first += count
    return files


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """A name that ends in `/` is an empty folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
