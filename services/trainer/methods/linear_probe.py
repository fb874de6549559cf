"""Linear probe: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, section 3.2
and appendix A.3.

L2-regularised multinomial logistic regression on the frozen model's image embeddings,

    argmin_{W, b} |W|^2 / 2 + c * sum_i -log softmax(W f(x_i) + b)_{y_i},

by L-BFGS to the optimum, in float64, with c chosen on the validation images among 10^-2 ... 10^6 by top-1, then by
negative log-likelihood, then the smaller; 100 without validation images (ours). Ours: the embeddings are those after
the last projection, of length 1 (the paper takes the raw features before it), whence a grid of larger c by decades (the
paper: 96 values from 1e-6 to 1e6); texts play no part. Expected: far below zero-shot at 1 shot, level with it at about
4 shots on the paper's data, above it from there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from services.trainer.methods.base import Fit, Frozen, MethodHyperparameters, unit
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from services.trainer.features import Features
    from shared.clip.loading import LoadedClip


class LinearProbeHyperparameters(MethodHyperparameters):
    inverse_regularisation: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="Weight c of the images' losses against half the squared norm of the weights (scikit-learn's C); "
        "not given: chosen on the validation images.",
        json_schema_extra=unit("1"),
    )


class LinearProbe(Frozen):
    name = "linear_probe"
    summary = "Logistic regression on the frozen model's image embeddings."
    source = "Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020"
    Hyperparameters = LinearProbeHyperparameters
    hyperparameters: LinearProbeHyperparameters

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def fit(self, features: "Features", clip: "LoadedClip", seed: int) -> Fit:
        from services.trainer.methods.logistic_regression import probe

        features.check_train(self.name)
        head, chosen = probe(features, self.hyperparameters.inverse_regularisation)
        return Fit(head, chosen=chosen, trainable_parameters=head.weight.numel() + head.bias.numel())
