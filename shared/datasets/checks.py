"""Is this data set fit for training? And which one is it?"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Final

from shared.datasets.classes import Split
from shared.datasets.report import Notice, listed
from shared.datasets.splits import Labelled
from shared.errors import InvalidInput

_EXAMPLES: Final = 5
Counts = Mapping[str, Mapping[str, int]]  # number of images by split and class


def check_counts(counts: Counts, declared: Iterable[str]) -> list[Notice]:
    """Raises InvalidInput: `no_images`, `one_class`, `class_without_training_images`. Returns the notice `empty_class`
    where it applies."""
    present = {name for classes in counts.values() for name in classes}
    if not present:
        raise InvalidInput(
            "None of the files is a usable image; the report says why for each of them.", code="no_images"
        )
    if len(present) == 1:
        raise InvalidInput(
            f"All images are of one class, {listed(sorted(present))}; a classifier needs at least two.",
            code="one_class",
        )
    if untrained := sorted(present - counts["train"].keys()):
        raise InvalidInput(
            f"Classes with val or test images but no train image: {listed(untrained)}. Add train images or leave the "
            "class out.",
            code="class_without_training_images",
        )
    if empty := sorted(set(declared) - present):
        return [Notice("empty_class", f"Classes without a usable image were left out: {listed(empty)}.")]
    return []


def duplicates(pairs: Iterable[tuple[Labelled, Labelled]]) -> list[Notice]:
    """`pairs`: an image, and another one with the same bytes. The notices `duplicates_across_splits`,
    `duplicates_with_different_labels` where they apply."""
    across, mislabelled = _Found(), _Found()
    for first, image in pairs:
        if first.class_name != image.class_name:
            mislabelled.add(f"{first.path} = {image.path}")
        if first.split != image.split:
            across.add(f"{first.path} ({first.split}) = {image.path} ({image.split})")
    notices = []
    if across.count:
        notices.append(
            Notice(
                "duplicates_across_splits",
                f"{across.count} images are in more than one split, which flatters the scores: {across.listed()}.",
            )
        )
    if mislabelled.count:
        notices.append(
            Notice(
                "duplicates_with_different_labels",
                f"{mislabelled.count} images appear under more than one class: {mislabelled.listed()}.",
            )
        )
    return notices


class _Found:
    """All are counted, the first are named."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def listed(self) -> str:
        return listed(self.examples, _EXAMPLES, self.count)


def fingerprint(rows: Iterable[tuple[str, str, str, Split]]) -> str:
    """SHA-256 (hex) over all (path, sha256, label, split), whatever their order: equal exactly for equal data sets. The
    label is the class's name, with the display name behind it where the user gave one: prompts and prefixes differ."""
    buckets = [bytearray() for _ in range(256)]  # by the digest's first byte: 32 bytes of memory per row, not 100
    for row in rows:
        digest = hashlib.sha256(json.dumps(row).encode()).digest()
        buckets[digest[0]] += digest
    whole = hashlib.sha256()
    for bucket in map(bytes, buckets):
        whole.update(b"".join(sorted(bucket[at : at + 32] for at in range(0, len(bucket), 32))))
    return whole.hexdigest()
