"""The end of an ingest on lists in memory, written down plainly: what `services.captioner.placing` does in the database
is held to it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from shared.datasets.checks import check_counts, duplicates
from shared.datasets.classes import SPLITS, Split
from shared.datasets.report import Notice
from shared.datasets.splits import Labelled, draw, rank, salt


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
        groups = _ranked_groups(items, pool, salt(seed, name))
        for group, side in draw(((group, len(group)) for group in groups), len(pool), val_fraction, test_fraction):
            for index in group:
                splits[index] = side
    return splits


def _ranked_groups(items: Sequence[Labelled], pool: list[int], salted: str) -> list[list[int]]:
    """Indices of images with the same bytes together, the groups in the order of the draw."""
    groups: dict[str, list[int]] = {}
    for index in pool:
        groups.setdefault(items[index].sha256 or f"path\0{items[index].path}", []).append(index)
    return sorted(groups.values(), key=lambda group: rank(salted, min(items[index].path for index in group)))


def check_classes(images: Sequence[Labelled], declared: Iterable[str]) -> list[Notice]:
    """`images` are the accepted ones with their final splits, `declared` every class the upload named. Raises and
    returns what `check_counts` and `duplicates` do."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for image in images:
        counts[image.split or "train"][image.class_name] += 1
    first: dict[str, Labelled] = {}
    pairs = ((first.setdefault(image.sha256, image), image) for image in images if image.sha256)
    return check_counts(counts, declared) + duplicates(pairs)
