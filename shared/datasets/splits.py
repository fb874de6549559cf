"""Drawing splits and few-shot subsets. Three seeds stay apart: this one, the shots' and the training's.

Images are ranked by a hash of seed, class and path, so a draw depends neither on input order nor on the Python version,
and adding images moves few others.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.datasets.classes import Split
from shared.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Labelled:
    """An accepted image. `split` is None where the upload did not say; `sha256` of its bytes, "" if unknown."""

    path: str
    class_name: str
    split: Split | None
    sha256: str = ""


def assign(items: Sequence[Labelled], seed: int, val_fraction: float = 0.1, test_fraction: float = 0.2) -> list[Split]:
    """The split of each item, in the order given. Splits the upload names are kept; unnamed images are train.

    Where no image at all is test (or val), that split is drawn from train: the fraction of each class, rounded, at
    least one image of a class that has enough (2 for test, 3 for both), and always leaving one to train on. Images
    of a class with the same bytes go to the same side.
    """
    splits: list[Split] = [item.split or "train" for item in items]
    if "test" in splits:
        test_fraction = 0.0
    if "val" in splits:
        val_fraction = 0.0
    train: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if splits[index] == "train":
            train.setdefault(item.class_name, []).append(index)
    for name, pool in train.items():
        wanted_test = _share(len(pool), test_fraction, len(pool) - 1)
        wanted_val = _share(len(pool), val_fraction, len(pool) - 1 - wanted_test)
        for group in _ranked_groups(items, pool, f"split\0{seed}\0{name}"):
            if len(group) <= wanted_test:
                wanted_test -= len(group)
                side: Split = "test"
            elif len(group) <= wanted_val:
                wanted_val -= len(group)
                side = "val"
            else:
                continue
            for index in group:
                splits[index] = side
    return splits


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
        chosen += sorted(sorted(paths, key=lambda path: _rank(f"shots\0{shot_seed}\0{name}", path))[:shots])
    return chosen, {name: len(paths) for name, paths in sorted(paths_by_class.items()) if len(paths) < shots}


def _share(size: int, fraction: float, most: int) -> int:
    if fraction <= 0:
        return 0
    return max(0, min(most, max(1, math.floor(size * fraction + 0.5))))


def _ranked_groups(items: Sequence[Labelled], pool: list[int], salt: str) -> list[list[int]]:
    """Indices of images with the same bytes together, the groups in the order of the draw."""
    groups: dict[str, list[int]] = {}
    for index in pool:
        groups.setdefault(items[index].sha256 or f"path\0{items[index].path}", []).append(index)
    return sorted(groups.values(), key=lambda group: _rank(salt, min(items[index].path for index in group)))


def _rank(salt: str, path: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{path}".encode()).digest()
