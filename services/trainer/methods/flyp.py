"""FLYP: "Finetune Like You Pretrain", arXiv 2212.00638.

CLIP is fine-tuned whole on its own contrastive loss, each image paired with "a photo of a {class}."; the same sentence
is the class's prototype. It is MMFT at w = 0 without captions, and the baseline that shows what captions add. Pairs of
one class in one batch are negatives of each other, as in the paper. Expected: above cross-entropy fine-tuning on most
of the paper's few-shot sets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.trainer.methods.base import FineTune
from shared.templates import photo_of

if TYPE_CHECKING:
    from torch import Tensor


class FLYP(FineTune):
    name = "flyp"
    summary = "Fine-tunes CLIP on images paired with a class template, with CLIP's own contrastive loss."

    def image_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def loss(
        self, image_emb: "Tensor", text_emb: "Tensor", logit_scale: "Tensor", labels: "Tensor"
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        from services.trainer.losses import mmft_loss

        loss, parts = mmft_loss(image_emb, text_emb, logit_scale, labels, w=0.0, variant="exclude_self")
        return loss, {"clip": parts["clip"]}
