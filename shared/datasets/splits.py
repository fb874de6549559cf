"""Drawing splits and few-shot subsets. Three seeds stay apart: this one, the shots' and the training's.

Images are ranked by a hash of seed, class and path, so a draw depends neither on input order nor on the Python version,
and adding images moves few others.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shared.datasets.classes import Split
from shared.errors import InvalidInput

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Labelled:
    """An accepted image. `split` is None where the upload did not say; `sha256` of its bytes, "" if unknown."""

    path: str
    class_name: str
    split: Split | None
    sha256: str = ""


def salt(seed: int, class_name: str) -> str:
    """What a class's images are ranked by, together with their paths: SHA-256 over `salt\\0path`."""
    return f"split\0{seed}\0{class_name}"


def draw(
    groups: Iterable[tuple[K, int]], images: int, val_fraction: float, test_fraction: float
) -> Iterator[tuple[K, Split]]:
    """Of one class: `groups` of images with the same bytes, each with its size, in the order of their ranks, `images`
    together. Those that leave train, with their new split: the fractions, rounded, at least one image where there are
    enough (2 for test, 3 for both), and always leaving one to train on."""
    wanted_test = _share(images, test_fraction, images - 1)
    wanted_val = _share(images, val_fraction, images - 1 - wanted_test)
    for group, size in groups:
        if size <= wanted_test:
            wanted_test -= size
            yield group, "test"
        elif size <= wanted_val:
            wanted_val -= size
            yield group, "val"


def few_shot(
    paths_by_class: Mapping[str, Sequence[str]], shots: int, shot_seed: int
) -> tuple[list[str], dict[str, int]]:
    """Paths of `shots` images per class, and how many each class has that has fewer (all of those are taken).

    With the same seed, 4 shots are among the 8. Raises InvalidInput for shots below 1.
    """
    if shots < 1:
        raise InvalidInput("shots must be at least 1.", code="shots_out_of_range", param="shots")
    chosen: list[str] = []
    for name, paths in sorted(paths_by_class.items()):
        chosen += sorted(sorted(paths, key=lambda path: rank(f"shots\0{shot_seed}\0{name}", path))[:shots])
    return chosen, {name: len(paths) for name, paths in sorted(paths_by_class.items()) if len(paths) < shots}


def _share(size: int, fraction: float, most: int) -> int:
    if fraction <= 0:
        return 0
    return max(0, min(most, max(1, math.floor(size * fraction + 0.5))))


def rank(salt: str, path: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{path}".encode()).digest()
