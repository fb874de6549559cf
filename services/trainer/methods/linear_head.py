"""What fine-tunes with a linear classification head have in common: they train the image tower and the head, the text
tower stays as it is, and no text is encoded in a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from services.trainer.methods.base import FineTune, FineTuneHyperparameters, unit
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from torch import nn

    from services.trainer.features import Features
    from shared.classifier.head import Head
    from shared.clip.loading import LoadedClip


class LinearHeadHyperparameters(FineTuneHyperparameters):
    trainable: Literal["visual", "projections", "lora"] = Field(
        "visual",
        description="What is trained beside the head: the image tower, its last projection only, or low-rank adapters "
        "(LoRA, arXiv 2106.09685) in it.",
        json_schema_extra=unit("choice"),
    )
    lora_towers: Literal["visual"] = Field(
        "visual",
        description="The tower that gets adapters where `trainable` is `lora`.",
        json_schema_extra=unit("choice"),
    )


class LinearHead(FineTune):
    """The head starts as the text prototypes times exp(logit_scale), without bias: the first step sees the zero-shot
    classifier's logits (WiSE-FT, arXiv 2109.01903, section 2)."""

    Hyperparameters = LinearHeadHyperparameters
    step_texts = "none"

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def head(self, features: "Features", clip: "LoadedClip", seed: int) -> "nn.Linear | None":
        from shared.classifier.head import Head

        return trainable(Head.of_prototypes(features.prototypes, features.logit_scale))


def trainable(start: "Head") -> "nn.Linear":
    """A layer that computes `start.logits`."""
    import torch
    from torch import nn

    layer = nn.Linear(start.weight.shape[1], start.weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(start.weight)
        layer.bias.copy_(start.bias)
    return layer
