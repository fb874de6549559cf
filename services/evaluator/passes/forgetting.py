"""What fine-tuning cost elsewhere: zero-shot top-1 on a held-aside data set by the base model and by this one, both
with "a photo of a {class}." for a text. `forgetting` = before - after; below 0 the model got better there. A classifier
on the base model's own weights forgets nothing. At most 5,000 images, drawn evenly by a fixed seed. That fine-tuning
costs accuracy on other data is what WiSE-FT sets out from (Wortsman et al. 2021, arXiv 2109.01903)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from services.evaluator.passes.base import OnStep
from shared.clip.templates import photo_of

LIMIT = 5000  # images

Embed = Callable[[], Tensor]  # -> (N, D), the held-aside images, rows of length 1
Texts = Callable[[Sequence[str]], Tensor]  # -> (T, D), rows of length 1


class Forgetting:
    """before and after: what embeds the held-aside images and what embeds texts, by the base model and by this one.
    labels (N,) index display_names."""

    def __init__(
        self,
        before: tuple[Embed, Texts],
        after: tuple[Embed, Texts],
        labels: Sequence[int],
        display_names: Sequence[str],
    ) -> None:
        self._before, self._after = before, after
        self._labels, self._names = torch.tensor(labels), list(display_names)
        self.detail: dict[str, Any] = {"images": len(labels), "classes": len(self._names)}

    def run(self, on_step: OnStep) -> Iterator[tuple[str, float]]:
        on_step(0, 2)
        before = self._top1(*self._before)
        on_step(1, 2)
        after = self._top1(*self._after)
        on_step(2, 2)
        yield "forgetting_before", before
        yield "forgetting_after", after
        yield "forgetting", before - after

    def _top1(self, images: Embed, texts: Texts) -> float:
        nearest = (images() @ texts([photo_of(name) for name in self._names]).T).argmax(1)
        return float((nearest == self._labels).double().mean())
