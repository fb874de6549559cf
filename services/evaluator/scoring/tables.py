"""What an evaluation tells beside its scores: how each class fares, and which classes are taken for which."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from services.evaluator.metrics.base import Predictions

MAX_CLASSES = 1000  # rows of the table of classes: those with the lowest recall, where there are more
MAX_PAIRS = 50


def per_class(p: Predictions, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """`class_name`, `images`, `predicted` (images given this class), `precision` (None where no image was),
    `recall` and `f1` (None where the class has no image), worst recall first, equal ones in class order."""
    rows: list[dict[str, Any]] = []
    for c, name in enumerate(class_names):
        images, predicted, hits = (int(n[c]) for n in (p.images_per_class, p.predicted_per_class, p.hits_per_class))
        rows.append(
            {
                "class_name": name,
                "images": images,
                "predicted": predicted,
                "precision": _ratio(hits, predicted),
                "recall": _ratio(hits, images),
                "f1": _ratio(2 * hits, images + predicted) if images else None,
            }
        )
    rows.sort(key=lambda row: 2.0 if row["recall"] is None else row["recall"])
    return rows[:MAX_CLASSES]


def confusions(p: Predictions, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs most often confused: `class_name`, `predicted`, `images`, and their `share` of the class's images."""
    wrong = p.predicted != p.labels
    pairs = p.labels[wrong] * len(class_names) + p.predicted[wrong]
    found, counts = np.unique(pairs, return_counts=True)
    rows = []
    for place in np.argsort(-counts, kind="stable")[:MAX_PAIRS]:
        label, predicted = divmod(int(found[place]), len(class_names))
        images = int(counts[place])
        rows.append(
            {
                "class_name": class_names[label],
                "predicted": class_names[predicted],
                "images": images,
                "share": _ratio(images, int(p.images_per_class[label])),
            }
        )
    return rows


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
