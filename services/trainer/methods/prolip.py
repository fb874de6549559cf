"""ProLIP: "CLIP's Visual Embedding Projector is a Few-shot Cornucopia", arXiv 2410.05270.

Only the image tower's last projection W (W0 before) is trained, on what the frozen tower gives it,

    L = CE(exp(logit_scale) * cos(W h(x), text prototypes), y) + lambda * |W - W0|_F^2,   lambda = 1/N

at N shots (all images: their mean number per class), 300 full-batch steps at 1e-5. No validation data are needed, for
nothing is chosen. The classifier is the text prototypes over the new projection, which is the one tensor of the model
that changes. A tower whose projection is an MLP has its last layer trained; biases stay.

Ours: Adam with a cosine to 0, and the features of the centre crop alone (the paper draws one of 300 augmented views of
each image for each step, and finds learning rates from 1e-5 to 1e-2 alike). Expected: in the paper above linear probes,
adapters and prompt tuning on the mean of 11 data sets, and stable over learning rates.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from services.trainer.methods.base import Fit, Frozen, MethodHyperparameters, unit
from shared.clip.templates import photo_of

if TYPE_CHECKING:
    from services.trainer.features import Features
    from shared.clip.loading import LoadedClip


class ProLIPHyperparameters(MethodHyperparameters):
    steps: int = Field(300, ge=1, le=100_000, description="Full-batch steps.", json_schema_extra=unit("steps"))
    learning_rate: float = Field(
        1e-5,
        gt=0,
        le=1,
        description="Adam's peak step size, annealed to 0 by a cosine, step by step.",
        json_schema_extra=unit("1"),
    )
    penalty: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Weight of the squared distance to the original projection; not given: 1 over the shots.",
        json_schema_extra=unit("1"),
    )


class ProLIP(Frozen):
    name = "prolip"
    summary = "Trains the image tower's last projection alone, held near its original."
    source = "CLIP's Visual Embedding Projector is a Few-shot Cornucopia, arXiv 2410.05270"
    Hyperparameters = ProLIPHyperparameters
    hyperparameters: ProLIPHyperparameters
    needs_unprojected = True

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [photo_of(display)]

    def fit(self, features: "Features", clip: "LoadedClip", seed: int) -> Fit:
        import math

        import torch
        import torch.nn.functional as F

        from shared.classifier.head import Head
        from shared.clip.projection import last_projection
        from shared.errors import InvalidInput

        features.check_train(self.name, unprojected=True)
        hp, projection, device = self.hyperparameters, last_projection(clip), next(clip.model.parameters()).device
        shots = features.shots or len(features.train_labels) / len(features.class_names)
        penalty = 1 / shots if hp.penalty is None else hp.penalty
        x, labels = features.train_unprojected.to(device), features.train_labels.to(device)
        head = Head.of_prototypes(features.prototypes, features.logit_scale)
        text = head.weight.to(device)
        original = projection.weight.float()
        weight = original.clone()
        optimizer = torch.optim.Adam([weight], lr=hp.learning_rate, fused=True)
        for step in range(hp.steps):
            optimizer.param_groups[0]["lr"] = hp.learning_rate * (1 + math.cos(math.pi * step / hp.steps)) / 2
            projected = projection.project(x, weight).requires_grad_()
            cross_entropy = F.cross_entropy(F.normalize(projected, dim=-1) @ text.T, labels)
            (slope,) = torch.autograd.grad(cross_entropy, projected)
            # The weight's gradient written out: the penalty's part costs no passes of its own over the weights.
            left, right = (slope.T, x) if projection.of_layer else (x.T, slope)
            weight.grad = torch.addmm(weight - original, left, right, beta=2 * penalty)
            optimizer.step()
        final = weight.cpu().contiguous()
        if not torch.isfinite(final).all():
            raise InvalidInput(
                f"Training of the projection has diverged. Lower learning_rate (now {hp.learning_rate:g}).",
                code="loss_not_finite",
                param="method.hyperparameters.learning_rate",
            )
        distance = (weight - original).norm()
        chosen = {
            "penalty": penalty,
            "steps": hp.steps,
            "relative_change": float(distance / original.norm()),
            "loss": float(cross_entropy.detach() + penalty * distance.square()),
        }
        return Fit(head, changed={projection.name: final}, chosen=chosen, trainable_parameters=final.numel())
