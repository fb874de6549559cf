"""Which image a file means by a name: never a guess."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from shared.datasets.paths import relative


class Target(NamedTuple):
    image_id: str
    path: str
    class_name: str


class Matcher:
    """Holds the names of all images of a data set, about 300 bytes each; twice that once a name is no whole path."""

    def __init__(self, images: Iterable[Target]) -> None:
        self._by_path = {image.path: image for image in images}
        self._classes = {image.class_name for image in self._by_path.values()}

    def find(self, name: str, *, sidecar: bool = False) -> Sequence[Target]:
        """The image meant; several where the name is ambiguous; none where it is unknown.

        In this order: the image's whole path; for a sidecar (`name` ends in `.txt`), the path without its extension;
        the images with the same file name (or stem). Of those, folders that both paths name must agree: `cat/1.png`
        is `train/cat/1.png` and not `train/dog/1.png`, even where it alone is called so.
        """
        if sidecar:
            name = name[: -len(".txt")]
        wanted = relative(name.strip())
        if exact := self._by_path.get(relative(name)) or self._by_path.get(wanted):
            return [exact]
        last = _file(wanted)
        if not sidecar:
            return self._closest(wanted, self._names.get(last, []), str)
        stems = self._stems.get(last, [])
        if same := [image for image in stems if stem(image.path) == wanted]:
            return same
        # "1.png.txt" beside "1.png", as some tools write it, or "1.txt"
        return self._closest(wanted, self._names.get(last, []), str) or self._closest(wanted, stems, stem)

    def _closest(self, wanted: str, images: Sequence[Target], form: Callable[[str], str]) -> Sequence[Target]:
        folders = wanted.split("/")[:-1]
        if not folders:
            return images
        if agreeing := [image for image in images if _end_alike(wanted, form(image.path))]:
            return agreeing
        classes = self._classes.intersection(folders)
        return [image for image in images if not classes or image.class_name in classes]

    @cached_property
    def _names(self) -> dict[str, list[Target]]:
        found: dict[str, list[Target]] = {}
        for image in self._by_path.values():
            found.setdefault(_file(image.path), []).append(image)
        return found

    @cached_property
    def _stems(self) -> dict[str, list[Target]]:
        found: dict[str, list[Target]] = {}
        for image in self._by_path.values():
            found.setdefault(stem(_file(image.path)), []).append(image)
        return found


def stem(path: str) -> str:
    """`cat/1.png` -> `cat/1`; a leading dot begins no extension."""
    folder, slash, file = path.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _end_alike(a: str, b: str) -> bool:
    """Whether one path is the end of the other."""
    return f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}")
