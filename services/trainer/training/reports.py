"""What a run tells while it goes and in the end."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from services.trainer.methods.base import FineTune
from shared.classifier.head import Head
from shared.errors import InvalidInput


@dataclass(frozen=True)
class Figures:
    """loss and parts in nats; logit_scale exponentiated, as the step used it; images_per_s over this call's steps,
    validation left out."""

    loss: float
    parts: dict[str, float]
    lr: float
    logit_scale: float
    images_per_s: float


@dataclass(frozen=True)
class StepReport:
    """After an optimiser step. `epoch` counts from 1, `step` is how many are done.

    The figures are fetched from the device when first read, for which it must catch up: read them where `due` is set
    (at the first step, at an epoch's last, and half a second after the last one that was due), and the caller that
    does costs nothing. `grad_norm` (before clipping) is to be read before the callback returns, while the gradients
    are there. micro_batch: images encoded at a time, None: the whole batch. `snapshot(directory)` saves the state to
    resume from."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    due: bool
    micro_batch: int | None
    snapshot: Callable[[Path], None]
    fetch: Callable[[], Figures]
    fetch_grad_norm: Callable[[], float]

    @cached_property
    def figures(self) -> Figures:
        return self.fetch()

    @property
    def loss(self) -> float:
        return self.figures.loss

    @property
    def parts(self) -> dict[str, float]:
        return self.figures.parts

    @property
    def lr(self) -> float:
        return self.figures.lr

    @property
    def logit_scale(self) -> float:
        return self.figures.logit_scale

    @property
    def images_per_s(self) -> float:
        return self.figures.images_per_s

    @cached_property
    def grad_norm(self) -> float:
        return self.fetch_grad_norm()


@dataclass(frozen=True)
class EpochReport:
    """After an epoch, validated where there are validation images (else the accuracies are None)."""

    epoch: int
    epochs: int
    step: int
    total_steps: int
    val_top1: float | None
    best_epoch: int
    best_val_top1: float | None
    snapshot: Callable[[Path], None]


@dataclass(frozen=True)
class TrainResult:
    """model_state: the chosen weights, float32, on the CPU: the whole state_dict after a fine-tune, only what differs
    from the base model's otherwise. head: the classifier on their embeddings. best_epoch from 1 (0: nothing was trained
    by epochs); val_history: top-1 after each epoch (empty without validation); seconds and images_per_s: of this call,
    validation included and left out respectively; peak_memory_bytes: of the GPU, or of the process without one; chosen:
    what was chosen on validation images or derived. last_state and last_head: those of the last epoch, if asked for."""

    model_state: dict[str, Tensor]
    head: Head
    best_epoch: int
    val_top1: float | None
    val_history: list[float]
    steps: int
    seconds: float
    images_per_s: float
    trainable_parameters: int
    peak_memory_bytes: int | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    last_state: dict[str, Tensor] | None = None
    last_head: Head | None = None


class Diverged(InvalidInput):
    """The loss is no longer finite. last_good: what the epochs before would have given (the best of them, or without
    validation the last); None before the first epoch's end."""

    last_good: TrainResult | None = None

    @classmethod
    def at(cls, what: str, method: FineTune) -> Self:
        rate = method.hyperparameters.learning_rate
        message = f"{what}: training has diverged. Lower learning_rate (now {rate:g})."
        return cls(message, code="loss_not_finite", param="method.hyperparameters.learning_rate")
