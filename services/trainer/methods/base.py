"""What a way of making a classifier declares: its hyperparameters, the texts an image is paired with, the loss over a
batch, and the texts whose mean is a class's prototype. The loop (services/trainer/loop.py) does the rest.

Nothing here imports torch at run time: the API lists methods and validates hyperparameters without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor


def unit(name: str) -> dict[str, Any]:
    """`json_schema_extra` of a hyperparameter: the unit it is counted in, part of the public schema."""
    return {"unit": name}


class MethodHyperparameters(BaseModel):
    """A method without any. Unknown names and values out of range are errors, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FineTuneHyperparameters(MethodHyperparameters):
    """What every fine-tune on the shared loop has; the defaults are the paper's (arXiv 2601.21426)."""

    epochs: int = Field(
        50, ge=1, le=1000, description="Passes over the training images.", json_schema_extra=unit("epochs")
    )
    batch_size: int = Field(
        64,
        ge=2,
        le=4096,
        description="Most image-text pairs contrasted in a step; an epoch's batches differ by at most one.",
        json_schema_extra=unit("pairs"),
    )
    learning_rate: float = Field(
        1e-5,
        gt=0,
        le=1,
        description="AdamW's peak step size, annealed to 0 by a cosine, step by step.",
        json_schema_extra=unit("1"),
    )
    weight_decay: float = Field(
        1e-4,
        ge=0,
        le=1,
        description="AdamW's decoupled decay of weight matrices; norms, biases and the logit scale are left out.",
        json_schema_extra=unit("1"),
    )
    horizontal_flip: bool = Field(
        False,
        description="Mirror half of the images at random. Leave off where left and right matter (signs, letters).",
        json_schema_extra=unit("on/off"),
    )


class Method(ABC):
    """One way of making a classifier from a CLIP model. Construct through `services.trainer.methods.build`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Hyperparameters: ClassVar[type[MethodHyperparameters]] = MethodHyperparameters
    needs_captions: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def __init__(self, hyperparameters: MethodHyperparameters) -> None:
        self.hyperparameters = hyperparameters

    @classmethod
    def parse(cls, values: dict[str, Any]) -> MethodHyperparameters:
        """Checked hyperparameters with defaults filled in. Raises InvalidInput naming the first offending one."""
        try:
            return cls.Hyperparameters.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.Hyperparameters.model_fields) or "none"
            raise InvalidInput(
                f"Hyperparameter `{where}` of method `{cls.name}`: {first['msg'].lower()} (got {first['input']!r}). "
                f"This method's hyperparameters: {known}.",
                code="invalid_hyperparameter",
                param=f"method.hyperparameters.{where}",
            ) from None

    @abstractmethod
    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        """The texts whose mean embedding is the class's prototype, at least one. `display`: the class's name in text;
        `captions`: every caption of its training images, without prefix (empty where there are none)."""


class FineTune(Method):
    """A method trained by the shared loop. Each visit of an image draws one of its `image_texts` evenly."""

    trains = True
    Hyperparameters: ClassVar[type[MethodHyperparameters]] = FineTuneHyperparameters
    hyperparameters: FineTuneHyperparameters

    @abstractmethod
    def image_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        """The texts that one image may be paired with, at least one; `captions` are its own, without prefix."""

    @abstractmethod
    def loss(
        self, image_emb: "Tensor", text_emb: "Tensor", logit_scale: "Tensor", labels: "Tensor"
    ) -> tuple["Tensor", dict[str, "Tensor"]]:
        """Loss of a batch and its named parts for the log. Embeddings (B, D) float32, L2-normalised; logit_scale a
        scalar, exponentiated; labels (B,)."""
