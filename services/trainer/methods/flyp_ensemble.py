"""FLYP with prompt ensembling: "Finetune like you pretrain: Improved finetuning of zero-shot vision models", arXiv
2212.00638, with the 80 templates of CLIP (arXiv 2103.00020, section 3.1.4).

As `flyp`, but each image is paired with one of CLIP's 80 ImageNet templates, drawn anew at each visit, and a class's
prototype is the normalised mean of the embeddings of all 80. So it has as many texts as a captioner would give without
saying anything of the image: beside `mmft` it tells variety of text from content. Loss, defaults and presets are those
of `flyp`. Expected: at or slightly above `flyp`; the starter's text tower makes little of the templates.
"""

from collections.abc import Sequence

from services.trainer.methods.flyp import FLYP
from services.trainer.methods.zero_shot_ensemble import imagenet_templates


class FLYPEnsemble(FLYP):
    name = "flyp_ensemble"
    summary = "Fine-tunes CLIP on images paired with one of 80 class templates, with CLIP's own contrastive loss."

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return imagenet_templates(display)
