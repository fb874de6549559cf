"""Accuracy on corrupted copies of the images (services/evaluator/passes/corrupt.py), as ImageNet-C measures robustness
(Hendrycks & Dietterich 2019, arXiv 1903.12261).

The images are corrupted as the model sees them, after its own resize and crop. At most 200 images, drawn evenly by a
fixed seed, in nine corruptions at five severities: 9,000 copies, each the same for every classifier of this input size.

`corruption_top1`: the mean over corruptions and severities; `corruption_robustness`: that over the clean accuracy on
the same images (left out where the clean accuracy is 0). Expected: the first below the clean accuracy, the second
between chance / accuracy and 1."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.evaluator.passes.base import SEED, OnStep
from services.evaluator.passes.corrupt import CORRUPTIONS, SEVERITIES, Pixels

LIMIT = 200  # images
BATCH = 50


class Corruptions:
    """pixels (N, 3, S, S) uint8 and labels (N,): the sample. names: one per image, whatever their order they seed the
    noise. logits: (B, 3, S, S) uint8 -> (B, C)."""

    def __init__(
        self, pixels: Tensor, labels: Sequence[int], names: Sequence[str], logits: Callable[[Tensor], Tensor]
    ) -> None:
        self._images: list[Pixels] = [image.permute(1, 2, 0).numpy() for image in pixels]
        self._labels, self._names, self._logits = torch.tensor(labels), names, logits
        self.detail: dict[str, Any] = {}

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]:
        steps = len(CORRUPTIONS) * len(SEVERITIES)
        clean = self._accuracy(lambda image, name: image)
        accuracy: dict[str, list[float]] = {}
        for name in CORRUPTIONS:
            accuracy[name] = []
            for severity in SEVERITIES:
                on_step(len(accuracy) * len(SEVERITIES) - len(SEVERITIES) + severity - 1, steps)

                def corrupted(image: Pixels, of: str, name: str = name, severity: int = severity) -> Pixels:
                    seeds = [SEED, zlib.crc32(of.encode()), zlib.crc32(name.encode()), severity]
                    return CORRUPTIONS[name](image, severity, np.random.default_rng(seeds))

                accuracy[name].append(self._accuracy(corrupted))
        on_step(steps, steps)
        mean = float(np.mean(list(accuracy.values())))
        self.detail = {
            "images": len(self._images),
            "seed": SEED,
            "clean_top1": clean,
            "top1": {name: [round(value, 4) for value in values] for name, values in accuracy.items()},
        }
        yield "corruption_top1", mean
        if clean > 0:
            yield "corruption_robustness", mean / clean

    def _accuracy(self, change: Callable[[Pixels, str], Pixels]) -> float:
        hits = 0
        for start in range(0, len(self._images), BATCH):
            part = slice(start, start + BATCH)
            changed = [change(image, name) for image, name in zip(self._images[part], self._names[part], strict=True)]
            batch = torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()
            hits += int((self._logits(batch).argmax(1) == self._labels[part]).sum())
        return hits / len(self._images)
