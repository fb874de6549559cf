"""Which image a file means by a name: never a guess."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from shared.datasets.classes import split_of
from shared.datasets.paths import relative


class Target(NamedTuple):
    image_id: str
    path: str
    class_name: str
    split: str


class Match(NamedTuple):
    """The image meant; several where the name is ambiguous; none where it is unknown. `exact`: by its whole path."""

    images: Sequence[Target]
    exact: bool = False


class Matcher:
    """Holds the names of all images of a data set, about 300 bytes each; twice that once a name is no whole path."""

    def __init__(self, images: Iterable[Target]) -> None:
        self._by_path = {image.path: image for image in images}
        self._classes = {image.class_name for image in self._by_path.values()}

    def find(self, name: str, *, sidecar: bool = False) -> Match:
        """By the image's whole path; for a sidecar (`name` ends in `.txt`), the path without its extension; else by the
        end of it.

        A bare file name (or stem) is enough where it is unique. With folders, one path must be the end of the other:
        `cat/1.png` is `train/cat/1.png`, never `dog/1.png`. What stands before the image's own path must be neutral:
        `photos/cat/1.png` is `cat/1.png`, but `test/cat/1.png` is not where that belongs to `train`, and `dog/1.png` is
        no `1.png` of class `cat`.
        """
        if sidecar:
            name = name[: -len(".txt")]
        wanted = _normal(name)
        if whole := self._by_path.get(relative(name)) or self._by_path.get(wanted):
            return Match([whole], exact=True)
        last = _file(wanted)
        if not sidecar:
            return Match(self._alike(wanted, self._names.get(last, []), str))
        stems = self._stems.get(last, [])
        if same := [image for image in stems if stem(image.path) == wanted]:
            return Match(same, exact=len(same) == 1)
        # "1.png.txt" beside "1.png", as some tools write it, or "1.txt"
        return Match(self._alike(wanted, self._names.get(last, []), str) or self._alike(wanted, stems, stem))

    def _alike(self, wanted: str, images: Sequence[Target], form: Callable[[str], str]) -> Sequence[Target]:
        return [image for image in images if self._ends_alike(wanted, form(image.path), image)]

    def _ends_alike(self, wanted: str, path: str, image: Target) -> bool:
        if f"/{path}".endswith(f"/{wanted}"):
            return True
        if not wanted.endswith(f"/{path}"):
            return False
        before = wanted[: -len(path) - 1].split("/")
        others = self._classes.intersection(before) - {image.class_name}
        return not others and {split_of(folder) for folder in before} <= {None, image.split}

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


class Claims:
    """What the names of a whole file come to: all are added first, then looked up. An image goes to the name that is
    its whole path; without one, to the only other name that means it; to none of several, which may be as many
    different pictures elsewhere. Holds one name per image."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._whole: set[str] = set()
        self._by_end: dict[str, str | None] = {}  # None: several

    def add(self, name: str, *, sidecar: bool = False) -> None:
        images, exact = self._matcher.find(name, sidecar=sidecar)
        if len(images) != 1:
            return
        id = images[0].image_id
        if exact:
            self._whole.add(id)
        elif self._by_end.setdefault(id, _normal(name)) != _normal(name):
            self._by_end[id] = None

    def find(self, name: str, *, sidecar: bool = False) -> tuple[Sequence[Target], bool]:
        """The images as `Matcher.find` has them, and whether this name may have the one that it means."""
        images, exact = self._matcher.find(name, sidecar=sidecar)
        if len(images) != 1:
            return images, False
        id = images[0].image_id
        return images, exact or (id not in self._whole and self._by_end.get(id) is not None)


def stem(path: str) -> str:
    """`cat/1.png` -> `cat/1`; a leading dot begins no extension."""
    folder, slash, file = path.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _normal(name: str) -> str:
    return relative(name.strip())
