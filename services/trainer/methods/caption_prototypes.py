"""Class-averaged captions without training: the inference of MMFT ("MultiModal Fine-tuning with Synthetic Captions",
arXiv 2601.21426) on the base model.

A class's prototype is the normalised mean of the normalised embeddings of every caption of its training images, each
after "a photo of a {class}."; a class without any has that sentence alone. Beside `zero_shot` it shows what captions
give by themselves, and beside `mmft` what training gives. Expected: above `zero_shot` on a CLIP whose text tower knows
images; on the starter, whose text tower never saw one, below it.
"""

from collections.abc import Sequence

from pydantic import Field

from services.trainer.methods.base import Method, MethodHyperparameters, unit
from services.trainer.methods.caption_texts import first_captions
from shared.clip.templates import photo_of, prefixed


class CaptionPrototypesHyperparameters(MethodHyperparameters):
    captions_per_image: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Use this many of each image's captions, always the same ones; not given: all.",
        json_schema_extra=unit("captions"),
    )


class CaptionPrototypes(Method):
    name = "caption_prototypes"
    summary = "No training: images are compared with the mean of their class's captions."
    source = "MultiModal Fine-tuning with Synthetic Captions, arXiv 2601.21426"
    needs_captions = True
    Hyperparameters = CaptionPrototypesHyperparameters
    hyperparameters: CaptionPrototypesHyperparameters

    def captions_of(self, captions: Sequence[str]) -> list[str]:
        return first_captions(captions, self.hyperparameters.captions_per_image)

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [prefixed(display, caption) for caption in captions] or [photo_of(display)]
