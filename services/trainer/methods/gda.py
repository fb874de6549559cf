"""Training-free Gaussian discriminant analysis: "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation",
arXiv 2402.04087.

Classes are Gaussians with one covariance. From the n training embeddings, with mu_c a class's mean, cov the covariance
of the embeddings around their class's mean, d their width and pi_c = 1/C,

    S^-1 = d * pinv((n - 1) * cov + tr(cov) * I),   w_c = S^-1 mu_c,   b_c = log pi_c - mu_c' S^-1 mu_c / 2,
    logits = exp(logit_scale) * cos(image, "a photo of a {c}.") + alpha * (image . w_c + b_c),

alpha being chosen on the validation images among 1e-4 ... 100 (by top-1, the smallest of equals); 1 without validation
images (ours: both classifiers as they are). Ours: the model's own logit scale stands for the paper's 100, which is that
of the CLIPs it uses; with one image for each class, where nothing varies around the means, tr(cov) I is taken of the
embeddings around their common mean instead (the paper makes more views of the images). Expected: in the paper above or
level with trained adapters on the mean of 11 data sets; nothing is trained.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from services.trainer.methods.base import Fit, Frozen, MethodHyperparameters, unit
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from torch import Tensor

    from services.trainer.features import Features
    from shared.clip.loading import LoadedClip

GRID = tuple(10.0**power for power in range(-4, 3))
DEFAULT = 1.0  # without validation images


class GDAHyperparameters(MethodHyperparameters):
    alpha: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Weight of the Gaussian classifier beside the zero-shot one; not given: chosen on the validation "
        "images.",
        json_schema_extra=unit("1"),
    )


class GDA(Frozen):
    name = "gda"
    summary = "Adds a closed-form Gaussian classifier of the image embeddings to the zero-shot classifier."
    source = "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, arXiv 2402.04087"
    Hyperparameters = GDAHyperparameters
    hyperparameters: GDAHyperparameters

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def fit(self, features: "Features", clip: "LoadedClip", seed: int) -> Fit:
        from shared.classifier.head import Head

        features.check_train(self.name)
        weight, bias = gaussian(features.train.double(), features.train_labels.long(), len(features.class_names))
        zero_shot = Head.of_prototypes(features.prototypes.double(), features.logit_scale)

        def head(alpha: float) -> Head:
            return Head((zero_shot.weight + alpha * weight).float(), (alpha * bias).float())

        alpha = self.hyperparameters.alpha
        chosen: dict[str, Any] = {"by": "given"}
        if alpha is None and len(features.val_labels):
            curve = {value: head(value).top1(features.val, features.val_labels) for value in GRID}
            alpha = max(GRID, key=lambda value: (curve[value], -value))
            chosen = {"by": "val", "curve": [{"alpha": a, "val_top1": top1} for a, top1 in curve.items()]}
        elif alpha is None:
            alpha, chosen = DEFAULT, {"by": "default"}
        return Fit(head(alpha), chosen={"alpha": alpha, **chosen})


def gaussian(x: "Tensor", labels: "Tensor", classes: int) -> tuple["Tensor", "Tensor"]:
    """x (n, d) float64, labels (n,), each class among them -> w (C, d), b (C,)."""
    import math

    import torch

    counts = torch.bincount(labels, minlength=classes)
    mu = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x) / counts[:, None]
    around = x - mu[labels]
    scatter = around.T @ around  # (n - 1) * cov
    spread = (x - x.mean(0)).square().sum() if int(counts.max()) == 1 else scatter.trace()
    trace = spread / (len(x) - 1)
    inverse = x.shape[1] * torch.linalg.pinv(scatter + trace * torch.eye(x.shape[1], dtype=x.dtype), hermitian=True)
    weight = mu @ inverse
    return weight, -math.log(classes) - (weight * mu).sum(1) / 2
