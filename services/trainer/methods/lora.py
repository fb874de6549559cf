"""CLIP-LoRA: "Low-Rank Few-Shot Adaptation of Vision-Language Models", arXiv 2405.18541.

Low-rank adapters (arXiv 2106.09685) in both towers, or in one, everything else frozen, trained on the cross-entropy of
images against the class templates, which are encoded anew in each step:

    L = -log softmax_c(exp(logit_scale) * cos(image, "a photo of a {c}."))_y.

The classifier is the templates' embeddings by the adapted text tower. Defaults from the paper: rank 2, learning rate
2e-4, decay 1e-2, batch 32. Ours: adapters in every linear layer, attention and ungrouped convolution, scaled by 1 and
without dropout (the paper: on query, key and value alone, with dropout 0.25), so that towers without attention have
some too; 50 epochs like the other fine-tunes (the paper takes 500 steps for each shot, which is 16,000 epochs divided
by the number of classes: raise `epochs` to come near it); the logit scale is trained too (the paper's stays at 100);
crops are those of the shared loop. Expected: in the paper it is above prompt tuning and adapters on the mean of 11 data
sets at every number of shots; with far fewer steps than the paper's, less than that.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from services.trainer.methods.base import Batch, FineTune, FineTuneHyperparameters, unit
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from torch import Tensor


class LoRAHyperparameters(FineTuneHyperparameters):
    batch_size: int = Field(
        32,
        ge=2,
        le=65536,
        description="Most images in a step; an epoch's batches differ by at most one.",
        json_schema_extra=unit("images"),
    )
    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=1,
        description="AdamW's peak step size, annealed to 0 by a cosine, step by step.",
        json_schema_extra=unit("1"),
    )
    weight_decay: float = Field(
        1e-2, ge=0, le=1, description="AdamW's decoupled decay of what `decay` names.", json_schema_extra=unit("1")
    )
    trainable: Literal["lora"] = Field(
        "lora",
        description="Low-rank adapters in the towers that `lora_towers` names, and the logit scale.",
        json_schema_extra=unit("choice"),
    )
    lora_rank: int = Field(2, ge=1, le=256, description="Rank of the adapters.", json_schema_extra=unit("1"))
    lora_towers: Literal["both", "visual", "text"] = Field(
        "both", description="The towers that get adapters.", json_schema_extra=unit("choice")
    )


class LoRA(FineTune):
    name = "lora"
    summary = "Trains low-rank adapters in CLIP's towers on the cross-entropy of images against class templates."
    source = "Low-Rank Few-Shot Adaptation of Vision-Language Models, arXiv 2405.18541"
    Hyperparameters = LoRAHyperparameters
    hyperparameters: LoRAHyperparameters
    step_texts = "class"

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def loss(self, batch: Batch) -> tuple["Tensor", dict[str, "Tensor"]]:
        from services.trainer.training.losses import cross_entropy

        assert batch.text_emb is not None
        loss = cross_entropy(batch.logit_scale * batch.image_emb @ batch.text_emb.T, batch.labels)
        return loss, {"cross_entropy": loss.detach()}
