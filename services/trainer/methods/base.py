"""What a way of making a classifier declares: its hyperparameters, the texts an image is paired with, the loss over a
batch, and the texts whose mean is a class's prototype. The loop (services/trainer/training/loop.py) does the rest.

Nothing here imports torch at run time: the API lists methods and validates hyperparameters without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from shared.clip.templates import photo_of
from shared.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from services.trainer.features import Features
    from shared.classifier.head import Head
    from shared.clip.loading import LoadedClip


def unit(name: str) -> dict[str, Any]:
    """`json_schema_extra` of a hyperparameter: the unit it is counted in, part of the public schema."""
    return {"unit": name}


class MethodHyperparameters(BaseModel):
    """A method without any. Unknown names, values of another type or out of range are errors, never ignored or mended:
    "50", 50.0 and true are no integers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class FineTuneHyperparameters(MethodHyperparameters):
    """What every fine-tune on the shared loop has; the defaults are the paper's (arXiv 2601.21426) where it states one,
    and safe where it does not."""

    epochs: int = Field(
        50, ge=1, le=1000, description="Passes over the training images.", json_schema_extra=unit("epochs")
    )
    batch_size: int = Field(
        64,
        ge=2,
        le=65536,
        description="Most images in a step, contrasted with one another; an epoch's batches differ by at most one.",
        json_schema_extra=unit("images"),
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Images encoded at a time. The loss sees the whole batch whatever this is (GradCache, arXiv "
        "2101.06983); not given: the whole batch, halved when memory runs out.",
        json_schema_extra=unit("images"),
    )
    learning_rate: float = Field(
        1e-5,
        gt=0,
        le=1,
        description="AdamW's peak step size, annealed to 0 by a cosine, step by step.",
        json_schema_extra=unit("1"),
    )
    warmup: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate first rises to its peak, in a line.",
        json_schema_extra=unit("fraction of steps"),
    )
    weight_decay: float = Field(
        1e-4, ge=0, le=1, description="AdamW's decoupled decay of what `decay` names.", json_schema_extra=unit("1")
    )
    decay: Literal["matrices", "all"] = Field(
        "matrices",
        description="What is decayed: weight matrices alone, or everything, norms, biases and the logit scale included "
        "(as the paper's plain AdamW does).",
        json_schema_extra=unit("choice"),
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Each layer's learning rate is that of the layer above times this (arXiv 2003.10555).",
        json_schema_extra=unit("1"),
    )
    max_grad_norm: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Gradients are scaled down to this norm where they exceed it; not given: never.",
        json_schema_extra=unit("1"),
    )
    trainable: Literal["full", "visual", "text", "projections", "lora"] = Field(
        "full",
        description="What is trained: both towers, one of them, their last projections only, or low-rank adapters "
        "(LoRA, arXiv 2106.09685) in the towers that `lora_towers` names. The logit scale is, but with `visual` and "
        "`projections` left fixed.",
        json_schema_extra=unit("choice"),
    )
    lora_rank: int = Field(
        4, ge=1, le=256, description="Rank of the adapters where `trainable` is `lora`.", json_schema_extra=unit("1")
    )
    lora_towers: Literal["both", "visual", "text"] = Field(
        "both",
        description="The towers that get adapters where `trainable` is `lora`.",
        json_schema_extra=unit("choice"),
    )
    horizontal_flip: bool = Field(
        False,
        description="Mirror half of the images at random. Leave off where left and right matter (signs, letters).",
        json_schema_extra=unit("on/off"),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the towers' arithmetic; weights and loss stay float32. `auto`: bf16 where it is faster (a GPU "
        "that has it, matrix products on a CPU that has it), else fp32. With fp16 the loss is scaled, and the schedule "
        "waits where the optimiser had to skip.",
        json_schema_extra=unit("choice"),
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Validate and keep an exponential moving average of the weights, with this decay a step.",
        json_schema_extra=unit("1"),
    )
    wise_ft: float | Literal["val"] | None = Field(
        None,
        description="Interpolate with the base model's weights afterwards (WiSE-FT, arXiv 2109.01903): the share of "
        "the fine-tuned ones, 0 to 1, or `val` to choose it on the validation images.",
        json_schema_extra=unit("fraction"),
    )

    @field_validator("wise_ft")
    @classmethod
    def _fraction(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError("must be between 0 and 1, or 'val'")
        return value

    @field_validator("lora_rank", "lora_towers")
    @classmethod
    def _used(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if value != cls.model_fields[name].default and info.data.get("trainable") not in ("lora", None):
            raise ValueError(f"would be ignored, since trainable is '{info.data['trainable']}' and not 'lora'")
        return value


class Method(ABC):
    """One way of making a classifier from a CLIP model. Construct through `services.trainer.methods.build`. A subclass
    of this alone trains nothing; `Frozen` fits a head on the frozen model's features; `FineTune` trains the model."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]  # the paper: title, arXiv id
    kind: ClassVar[Literal["zero_shot", "frozen", "fine_tune"]] = "zero_shot"
    Hyperparameters: ClassVar[type[MethodHyperparameters]] = MethodHyperparameters
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # by preset, what differs from the schema's defaults
    needs_captions: ClassVar[bool] = False

    def __init__(self, hyperparameters: MethodHyperparameters) -> None:
        self.hyperparameters = hyperparameters

    @classmethod
    def parse(cls, values: dict[str, Any], preset: str = "default") -> MethodHyperparameters:
        """Checked hyperparameters with the preset's filled in. Raises InvalidInput naming the first offending one."""
        try:
            return cls.Hyperparameters.model_validate({**cls.presets.get(preset, {}), **values})
        except ValidationError as error:
            errors = error.errors()
            where = str(errors[0]["loc"][0])
            # A value that may be of several types has one error for each.
            wrong = " or ".join(dict.fromkeys(e["msg"].lower() for e in errors if e["loc"][0] == where))
            known = ", ".join(cls.Hyperparameters.model_fields) or "none"
            raise InvalidInput(
                f"Hyperparameter `{where}` of method `{cls.name}`: {wrong} (got {errors[0]['input']!r:.100}). "
                f"This method's hyperparameters: {known}.",
                code="invalid_hyperparameter",
                param=f"method.hyperparameters.{where}",
            ) from None

    def captions_of(self, captions: Sequence[str]) -> list[str]:
        """Of one image's usable captions those that the method uses, for training as well as for prototypes."""
        return list(captions)

    @abstractmethod
    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        """The texts whose mean embedding is the class's prototype, at least one. `display`: the class's name in text;
        `captions`: of all its training images what `captions_of` leaves, without prefix (possibly none)."""


@dataclass(frozen=True)
class Fit:
    """What a method on frozen features found. `changed`: tensors of the model that differ from the base's, by name
    (most methods: none). `chosen`: what it chose on validation images or derived, for the record."""

    head: "Head"
    changed: dict[str, "Tensor"] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0


class Frozen(Method):
    """A head on the frozen model's image features: seconds, without the model in the loop."""

    kind = "frozen"
    needs_unprojected: ClassVar[bool] = False  # the image tower's features before its last projection

    @abstractmethod
    def fit(self, features: "Features", clip: "LoadedClip", seed: int) -> Fit:
        """Deterministic in its arguments. Raises InvalidInput where the data don't allow it."""


@dataclass(frozen=True)
class Batch:
    """What a loss sees of a step. B images, C classes, D embedding; embeddings float32, L2-normalised.

    text_emb: (B, D), one text per image, or (C, D), one per class, or None, as the method's `step_texts` says;
    logit_scale: a scalar, exponentiated; prototypes (C, D): the base model's, fixed; head: what the method's `head`
    made, if it made one."""

    image_emb: "Tensor"
    text_emb: "Tensor | None"
    labels: "Tensor"  # (B,)
    logit_scale: "Tensor"
    prototypes: "Tensor"
    head: "nn.Linear | None"


class FineTune(Method):
    """A method trained by the shared loop (services/trainer/training/loop.py)."""

    kind = "fine_tune"
    Hyperparameters: ClassVar[type[MethodHyperparameters]] = FineTuneHyperparameters
    hyperparameters: FineTuneHyperparameters
    step_texts: ClassVar[Literal["image", "class", "none"]] = "image"  # what the text tower encodes in each step
    needs_features: ClassVar[bool] = False  # `head` wants the frozen features of the training images

    def image_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        """The texts that one image may be paired with, at least one, drawn evenly at each visit; `captions` are its
        own, without prefix. Used where `step_texts` is "image"."""
        return self.prototype_texts(display, captions)

    def class_text(self, display: str) -> str:
        """The text that stands for a class in each step, where `step_texts` is "class"."""
        return photo_of(display)

    def head(self, features: "Features", clip: "LoadedClip", seed: int) -> "nn.Linear | None":
        """A trainable classification head over image embeddings, which then is the classifier's; None: the classifier
        is the prototypes. What is made here is the start of the training."""
        return None

    @abstractmethod
    def loss(self, batch: Batch) -> tuple["Tensor", dict[str, "Tensor"]]:
        """The loss of a batch, in nats, and its named parts for the log, detached."""
