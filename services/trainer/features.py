"""What a method sees of a frozen model. Shapes: N training images, V validation images, C classes, D embedding, P width
of the image tower before its last projection."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.errors import InvalidInput


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Features:
    """The base model's embeddings of a run, on the CPU, float32.

    prototypes (C, D), L2-normalised: the class means of the method's `prototype_texts`; logit_scale exponentiated.
    train (N, D) and val (V, D), L2-normalised, and their labels: empty where the method does not ask for them
    (`needs_features`). train_unprojected (N, P) and val_unprojected (V, P): what the image tower's last projection is
    given, raw, for methods with `needs_unprojected`. shots: images per class asked for, None for all."""

    class_names: list[str]  # display names
    prototypes: Tensor
    logit_scale: float
    shots: int | None = None
    train: Tensor = field(default_factory=_none)
    train_labels: Tensor = field(default_factory=_none)
    val: Tensor = field(default_factory=_none)
    val_labels: Tensor = field(default_factory=_none)
    train_unprojected: Tensor = field(default_factory=_none)
    val_unprojected: Tensor = field(default_factory=_none)

    def check_train(self, method: str, *, unprojected: bool = False) -> None:
        """Raises InvalidInput unless there are features (or unprojected ones) of training images of every class, and of
        the validation images where there are labels."""
        train, val = (self.train_unprojected, self.val_unprojected) if unprojected else (self.train, self.val)
        for split, features, labels in (("train", train, self.train_labels), ("val", val, self.val_labels)):
            if len(features) != len(labels):
                raise InvalidInput(
                    f"Method `{method}` got features of {len(features)} {split} images for {len(labels)} labels.",
                    code="feature_count",
                )
            if not torch.isfinite(features).all():
                raise InvalidInput(
                    f"The model's features of the {split} images are not all finite: its weights are broken.",
                    code="features_not_finite",
                    param="model",
                )
        counts = torch.bincount(self.train_labels.long(), minlength=len(self.class_names))
        if missing := [name for name, count in zip(self.class_names, counts.tolist(), strict=True) if not count]:
            raise InvalidInput(
                f"Method `{method}` needs training images of every class; there is none of {', '.join(missing[:10])}"
                f"{f' and {len(missing) - 10} more' if len(missing) > 10 else ''}. Add some, or use a method that "
                "starts from class names.",
                code="class_without_images",
                param="dataset_id",
            )
