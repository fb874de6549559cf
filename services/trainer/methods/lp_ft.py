"""LP-FT: "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", arXiv 2202.10054.

First a linear probe (`linear_probe`) on the frozen image embeddings, then the image tower and the head are fine-tuned
together on the cross-entropy of `cross_entropy`, the probe being the head's start. With a head that fits already, the
first steps do not drag the features to where a bad head wants them.

The paper tunes the probe's regularisation and the learning rate on validation data: ours does so for the former (and
takes the probe's default without any) and keeps the learning rate of the other fine-tunes. The probe is fitted on the
embeddings of the centre crops. Preset `paper` decays everything. Expected: above `cross_entropy` where the text
prototypes are a poor start, near it where they are good; better than both of its halves out of distribution.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from services.trainer.methods.base import unit
from services.trainer.methods.cross_entropy import CrossEntropy, CrossEntropyHyperparameters
from services.trainer.methods.linear_head import trainable

if TYPE_CHECKING:
    from torch import nn

    from services.trainer.features import Features
    from shared.clip.loading import LoadedClip


class LPFTHyperparameters(CrossEntropyHyperparameters):
    inverse_regularisation: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Of the linear probe, see `linear_probe`; not given: chosen on the validation images.",
        json_schema_extra=unit("1"),
    )


class LPFT(CrossEntropy):
    name = "lp_ft"
    summary = "A linear probe on frozen features first, then the image tower and that head are fine-tuned."
    source = "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, arXiv 2202.10054"
    needs_features = True
    Hyperparameters = LPFTHyperparameters
    hyperparameters: LPFTHyperparameters

    def head(self, features: "Features", clip: "LoadedClip", seed: int) -> "nn.Linear | None":
        from services.trainer.methods.logistic_regression import probe
        from services.trainer.threads import threads_for

        features.check_train(self.name)
        with threads_for(len(features.train_labels)):
            return trainable(probe(features, self.hyperparameters.inverse_regularisation)[0])
