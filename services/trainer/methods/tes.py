"""TeS: "Improved Visual Fine-tuning with Natural Language Supervision", arXiv 2304.01489.

The image tower and a linear head are fine-tuned; a fixed text classifier keeps both near what words say. With
p = softmax(head(f(x))) and the text classifier's r = softmax(cos(f(x), text prototypes) / tau),

    L = CE(p, (1 - lambda_v) * onehot(y) + lambda_v * r) + lambda_t * CE(r, onehot(y)).

lambda_v = 0.1, lambda_t = 0.3 and tau = 0.03 are those of the authors' CIFAR-100 recipe. Ours: the head starts as the
text prototypes (the paper, whose towers were pretrained without text, starts anew and maps images to the text space by
a layer of its own, which a CLIP does not need); r is a constant where it is a target; optimiser, schedule and epochs
are those of the shared loop instead of SGD. Expected: a little above `cross_entropy`, most where images are few.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from services.trainer.methods.base import Batch, unit
from services.trainer.methods.linear_head import LinearHead, LinearHeadHyperparameters

if TYPE_CHECKING:
    from torch import Tensor


class TeSHyperparameters(LinearHeadHyperparameters):
    lambda_v: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the text classifier's distribution in the head's target.",
        json_schema_extra=unit("fraction"),
    )
    lambda_t: float = Field(
        0.3, ge=0, le=100, description="Weight of the text classifier's own loss.", json_schema_extra=unit("1")
    )
    tau: float = Field(
        0.03,
        gt=0,
        le=100,
        description="Temperature by which the text classifier's cosines are divided.",
        json_schema_extra=unit("1"),
    )


class TeS(LinearHead):
    name = "tes"
    summary = "Fine-tunes the image tower and a linear head towards what a fixed text classifier says of each image."
    source = "Improved Visual Fine-tuning with Natural Language Supervision, arXiv 2304.01489"
    Hyperparameters = TeSHyperparameters
    hyperparameters: TeSHyperparameters
    presets = {"paper": {"decay": "all"}}

    def loss(self, batch: Batch) -> tuple["Tensor", dict[str, "Tensor"]]:
        from services.trainer.training.losses import tes_loss

        assert batch.head is not None
        hp = self.hyperparameters
        text_logits = batch.image_emb @ batch.prototypes.T / hp.tau
        return tes_loss(batch.head(batch.image_emb), text_logits, batch.labels, hp.lambda_v, hp.lambda_t)
