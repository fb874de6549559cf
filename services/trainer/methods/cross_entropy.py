"""Cross-entropy fine-tuning of CLIP's image tower with a linear head, as in "Robust fine-tuning of zero-shot models"
(WiSE-FT), arXiv 2109.01903.

    L = -log softmax(W f(x) + b)_y,   W = exp(logit_scale) * text prototypes and b = 0 at the start,

f(x) being the L2-normalised image embedding. So training starts as the zero-shot classifier. The head is trained at the
tower's learning rate; texts play no part after the start. The paper's recipe (3e-5, batch 512, decay 0.1, 10 epochs) is
for all of ImageNet; the defaults are those of `mmft` (arXiv 2601.21426), so that rows differ in the method alone, and
preset `paper` decays everything as there. Label smoothing is off, as in the paper. Expected: close to contrastive
fine-tuning on templates (both 69.2 +- 1.4 on 10 texture classes at 8 shots), more of zero-shot's robustness lost.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from services.trainer.methods.base import Batch, unit
from services.trainer.methods.linear_head import LinearHead, LinearHeadHyperparameters

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropyHyperparameters(LinearHeadHyperparameters):
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target that is spread evenly over all classes.",
        json_schema_extra=unit("fraction"),
    )


class CrossEntropy(LinearHead):
    name = "cross_entropy"
    summary = "Fine-tunes the image tower and a linear head, which starts as the zero-shot classifier."
    source = "Robust fine-tuning of zero-shot models, arXiv 2109.01903"
    Hyperparameters = CrossEntropyHyperparameters
    hyperparameters: CrossEntropyHyperparameters
    presets = {"paper": {"decay": "all"}}

    def loss(self, batch: Batch) -> tuple["Tensor", dict[str, "Tensor"]]:
        from services.trainer.training.losses import cross_entropy

        assert batch.head is not None
        loss = cross_entropy(batch.head(batch.image_emb), batch.labels, self.hyperparameters.label_smoothing)
        return loss, {"cross_entropy": loss.detach()}
