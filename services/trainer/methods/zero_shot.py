"""Zero-shot CLIP, arXiv 2103.00020: no training; a class's prototype is "a photo of a {class}."."""

from collections.abc import Sequence

from services.trainer.methods.base import Method
from shared.templates import photo_of


class ZeroShot(Method):
    name = "zero_shot"
    summary = "No training: images are compared with one sentence per class."

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]
