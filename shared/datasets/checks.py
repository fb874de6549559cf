"""Is this data set fit for training? And which one is it?"""

import hashlib
import json
from collections.abc import Iterable, Sequence

from shared.datasets.classes import Split
from shared.datasets.report import Notice, listed
from shared.datasets.splits import Labelled
from shared.errors import InvalidInput


def check_classes(images: Sequence[Labelled], declared: Iterable[str]) -> list[Notice]:
    """`images` are the accepted ones with their final splits, `declared` every class the upload named.

    Raises InvalidInput: `no_images`, `one_class`, `class_without_training_images`. Returns what the user should know:
    `empty_class`, `duplicates_across_splits`, `duplicates_with_different_labels`.
    """
    if not images:
        raise InvalidInput(
            "None of the files is a usable image; the report says why for each of them.", code="no_images"
        )
    present = {image.class_name for image in images}
    if len(present) == 1:
        raise InvalidInput(
            f"All images are of one class, {listed(sorted(present))}; a classifier needs at least two.",
            code="one_class",
        )
    if untrained := sorted(present - {image.class_name for image in images if image.split == "train"}):
        raise InvalidInput(
            f"Classes with val or test images but no train image: {listed(untrained)}. Add train images or leave the "
            "class out.",
            code="class_without_training_images",
        )
    notices = []
    if empty := sorted(set(declared) - present):
        notices.append(Notice("empty_class", f"Classes without a usable image were left out: {listed(empty)}."))
    return notices + _duplicates(images)


def _duplicates(images: Sequence[Labelled]) -> list[Notice]:
    first: dict[str, Labelled] = {}
    across: list[str] = []
    mislabelled: list[str] = []
    for image in images:
        if not image.sha256:
            continue
        other = first.setdefault(image.sha256, image)
        if other.class_name != image.class_name:
            mislabelled.append(f"{other.path} = {image.path}")
        if other.split != image.split:
            across.append(f"{other.path} ({other.split}) = {image.path} ({image.split})")
    notices = []
    if across:
        notices.append(
            Notice(
                "duplicates_across_splits",
                f"{len(across)} images are in more than one split, which flatters the scores: {listed(across)}.",
            )
        )
    if mislabelled:
        notices.append(
            Notice(
                "duplicates_with_different_labels",
                f"{len(mislabelled)} images appear under more than one class: {listed(mislabelled)}.",
            )
        )
    return notices


def fingerprint(rows: Iterable[tuple[str, str, str, Split]]) -> str:
    """SHA-256 (hex) over all (path, sha256, label, split), whatever their order: equal exactly for equal data sets. The
    label is the class's name, with the display name behind it where the user gave one: prompts and prefixes differ."""
    digests = sorted(hashlib.sha256(json.dumps(row).encode()).digest() for row in rows)
    return hashlib.sha256(b"".join(digests)).hexdigest()
