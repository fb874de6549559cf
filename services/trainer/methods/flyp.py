"""FLYP: "Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv 2212.00638.

CLIP is fine-tuned whole on its own contrastive loss, each image paired with "a photo of a {class}."; the same sentence
is the class's prototype:

    L_clip = -1/2B * sum_i [log p(text i | image i) + log p(image i | text i)].

It is MMFT at w = 0 without captions, and the baseline that shows what captions add. As in the paper, pairs of one class
in one batch are negatives of each other. The paper's own ImageNet recipe (batch 512, decay 0.1, 10 epochs) is made for
a thousand classes; the defaults here are those of `mmft`, so that rows differ in the method alone, and preset `paper`
is the set-up in which MMFT's paper (arXiv 2601.21426) runs it. Expected: above cross-entropy fine-tuning on most of
FLYP's few-shot sets; with fewer classes than images in a batch, false negatives eat that gain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.trainer.methods.base import Batch, FineTune
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from torch import Tensor


class FLYP(FineTune):
    name = "flyp"
    summary = "Fine-tunes CLIP on images paired with a class template, with CLIP's own contrastive loss."
    source = "Finetune like you pretrain: Improved finetuning of zero-shot vision models, arXiv 2212.00638"
    presets = {"paper": {"decay": "all"}}

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def loss(self, batch: Batch) -> tuple["Tensor", dict[str, "Tensor"]]:
        from services.trainer.training.losses import mmft_loss

        assert batch.text_emb is not None
        loss, parts = mmft_loss(batch.image_emb, batch.text_emb, batch.logit_scale, batch.labels, 0.0, "exclude_self")
        return loss, {"clip": parts["clip"]}
