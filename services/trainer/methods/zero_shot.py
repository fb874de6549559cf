"""Zero-shot CLIP: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.

No training: a class's prototype is "a photo of a {class}.", and an image's class is argmax_c cos(image, prototype_c).
No deviations and nothing to set. Expected: the floor that everything trained must beat; the paper gains 1.3 points on
ImageNet by this sentence over the bare name.
"""

from collections.abc import Sequence

from services.trainer.methods.base import Method
from shared.clip.templates import photo_of


class ZeroShot(Method):
    name = "zero_shot"
    summary = "No training: images are compared with one sentence per class."
    source = "Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020"

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]
