"""The training loop every method shares: fine-tunes a copy of a CLIP model and keeps the best epoch.

Reading order: `train` -> `_Run.run` -> `_Run._step`. A run is a function of (model, method, data, seed): every draw is
derived from the seed and the step (randomness.py), so a run resumed from a snapshot ends, on the CPU, with the very
weights of one that was never interrupted.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.trainer.augment import augment
from services.trainer.data import RunTexts, TrainData
from services.trainer.memory import freed_blocks_kept
from services.trainer.methods.base import FineTune, Method
from services.trainer.optim import (
    MAX_LOGIT_SCALE,
    build_optimizer,
    cosine,
    freeze_batch_norm_statistics,
    prefer_channels_last,
)
from services.trainer.prototypes import class_prototypes, top1
from services.trainer.randomness import derived_seed, generator
from services.trainer.state import read_state, write_state
from shared.clip import LoadedClip, encode_image, normalise, trim_padding
from shared.errors import InvalidInput


@dataclass(frozen=True)
class StepReport:
    """After an optimiser step. `epoch` counts from 1, `step` is how many are done; losses in nats; `logit_scale`
    exponentiated; `images_per_s` over this call's steps. `snapshot(directory)` saves the state to resume from."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    parts: dict[str, float]
    lr: float
    logit_scale: float
    images_per_s: float
    snapshot: Callable[[Path], None]


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
    """model_state: the chosen epoch's weights, float32, on the CPU; prototypes (C, D) float32, L2-normalised, by those
    weights; best_epoch from 1 (0: nothing was trained); val_history: top-1 after each epoch (empty without val);
    seconds and images_per_s: of this call, validation included and left out respectively."""

    model_state: dict[str, Tensor]
    prototypes: Tensor
    best_epoch: int
    val_top1: float | None
    val_history: list[float]
    steps: int
    seconds: float
    images_per_s: float
    trainable_parameters: int


def train(
    clip: LoadedClip,
    method: Method,
    data: TrainData,
    *,
    seed: int,
    resume: Path | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    device: str = "auto",
) -> TrainResult:
    """Make a classifier's weights and prototypes. `clip` itself is left as it is.

    `resume`: a directory that a report's `snapshot` wrote in a run of the same arguments. Callbacks may raise anything
    to stop; it passes through. `device`: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
    Raises InvalidInput on unusable data, a snapshot of another run, or a loss that is no longer finite.
    """
    data.check(clip, method)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    clip = replace(clip, model=copy.deepcopy(clip.model).to(place))
    texts = RunTexts(clip, method, data)
    if not isinstance(method, FineTune):
        return _untrained(clip, texts, data, place)
    with freed_blocks_kept(), torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        run = _Run(clip, method, data, texts, seed, place)
        if resume is not None:
            run.restore(resume)
        return run.run(on_step or _ignore, on_epoch or _ignore)


def _ignore(report: object) -> None:
    return None


def _untrained(clip: LoadedClip, texts: RunTexts, data: TrainData, device: torch.device) -> TrainResult:
    start = time.perf_counter()
    prototypes = class_prototypes(clip.model, texts.table, texts.prototype_rows)
    val = top1(encode_image(clip, data.val_images), prototypes, data.val_labels) if len(data.val_labels) else None
    return TrainResult(
        model_state={k: v.detach().cpu() for k, v in clip.model.state_dict().items()},
        prototypes=prototypes,
        best_epoch=0,
        val_top1=val,
        val_history=[],
        steps=0,
        seconds=time.perf_counter() - start,
        images_per_s=0.0,
        trainable_parameters=0,
    )


class _Run:
    def __init__(
        self, clip: LoadedClip, method: FineTune, data: TrainData, texts: RunTexts, seed: int, device: torch.device
    ) -> None:
        self.clip, self.model, self.method, self.data, self.texts = clip, clip.model, method, data, texts
        self.seed, self.device, self.hp = seed, device, method.hyperparameters
        self.steps_per_epoch = -(-len(data.labels) // self.hp.batch_size)
        self.total_steps = self.steps_per_epoch * self.hp.epochs
        prefer_channels_last(self.model)
        self.optimizer = build_optimizer(self.model, self.hp.learning_rate, self.hp.weight_decay)
        self.autocast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.step = 0  # optimiser steps done
        self.epochs_done = 0  # validated ones; one behind `step` when stopped right after an epoch's last step
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] | None = None  # None without validation: the last epoch's weights are kept
        self.best_prototypes: Tensor | None = None
        self.val_history: list[float] = []
        self.images_seen, self.train_seconds = 0, 0.0

    def run(self, on_step: Callable[[StepReport], None], on_epoch: Callable[[EpochReport], None]) -> TrainResult:
        start = time.perf_counter()
        while True:
            if self.step == (self.epochs_done + 1) * self.steps_per_epoch:
                on_epoch(self._end_epoch())
            if self.step == self.total_steps:
                break
            on_step(self._step())
        if self.best_state is None or self.best_prototypes is None:
            self.best_state, self.best_epoch = self._copy_state(), self.hp.epochs
            self.best_prototypes = self._prototypes()
        return TrainResult(
            model_state=self.best_state,
            prototypes=self.best_prototypes,
            best_epoch=self.best_epoch,
            val_top1=self._best_val(),
            val_history=self.val_history,
            steps=self.step,
            seconds=time.perf_counter() - start,
            images_per_s=self._images_per_s(),
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        )

    def _batch(self) -> Tensor:
        """Indices (B,) of the coming step's images: the epoch's permutation in parts that differ by at most one, since
        a remainder of one or two images would make a contrastive step of no meaning."""
        epoch, part = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.data.labels), generator=generator(self.seed, "order", epoch))
        return order.tensor_split(self.steps_per_epoch)[part]

    def _step(self) -> StepReport:
        start = time.perf_counter()
        rows = self._batch()
        rng = generator(self.seed, "step", self.step)
        torch.manual_seed(derived_seed(self.seed, "model", self.step))  # dropout
        lr = self.hp.learning_rate * cosine(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = augment(self.data.images[rows].to(self.device), rng, flip=self.hp.horizontal_flip)
        tokens = trim_padding(self.model, self.texts.draw(rows, rng)).to(self.device)
        labels = self.data.labels[rows].to(self.device)

        self.model.train()
        freeze_batch_norm_statistics(self.model)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            image_emb = self.model.encode_image(normalise(images, self.clip), normalize=True)
            text_emb = self.model.encode_text(tokens, normalize=True)
        scale = self.model.logit_scale.exp().squeeze()
        loss, parts = self.method.loss(image_emb.float(), text_emb.float(), scale, labels)
        if not torch.isfinite(loss):
            raise InvalidInput(
                f"The loss is {loss.item()} at step {self.step + 1} of {self.total_steps}: training has diverged. "
                f"Lower learning_rate (now {self.hp.learning_rate:g}).",
                code="loss_not_finite",
                param="method.hyperparameters.learning_rate",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

        self.step += 1
        self.images_seen += len(rows)
        self.train_seconds += time.perf_counter() - start
        return StepReport(
            step=self.step,
            total_steps=self.total_steps,
            epoch=(self.step - 1) // self.steps_per_epoch + 1,
            epochs=self.hp.epochs,
            loss=loss.item(),
            parts={name: part.item() for name, part in parts.items()},
            lr=lr,
            logit_scale=scale.item(),
            images_per_s=self._images_per_s(),
            snapshot=self.save,
        )

    def _end_epoch(self) -> EpochReport:
        """Validate, and keep the weights if they are the best so far; a tie keeps the earlier."""
        self.epochs_done += 1
        val: float | None = None
        if len(self.data.val_labels):
            prototypes = self._prototypes()
            val = top1(encode_image(self.clip, self.data.val_images), prototypes, self.data.val_labels)
            if val > max(self.val_history, default=-1.0):
                self.best_epoch, self.best_prototypes = self.epochs_done, prototypes
                self.best_state = self._copy_state()
            self.val_history.append(val)
        return EpochReport(
            epoch=self.epochs_done,
            epochs=self.hp.epochs,
            step=self.step,
            total_steps=self.total_steps,
            val_top1=val,
            best_epoch=self.best_epoch or self.epochs_done,
            best_val_top1=self._best_val(),
            snapshot=self.save,
        )

    def _prototypes(self) -> Tensor:
        self.model.eval()
        return class_prototypes(self.model, self.texts.table, self.texts.prototype_rows)

    def _best_val(self) -> float | None:
        return max(self.val_history, default=None)

    def _images_per_s(self) -> float:
        return self.images_seen / self.train_seconds if self.train_seconds else 0.0

    def _copy_state(self) -> dict[str, Tensor]:
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.model.state_dict().items()
        }

    def save(self, directory: Path) -> None:
        """Write what `restore` needs into `directory`, replacing what is there in one rename."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        if self.best_state is not None and self.best_prototypes is not None:
            tensors |= {f"best/{name}": value for name, value in self.best_state.items()}
            tensors["best_prototypes"] = self.best_prototypes
        write_state(
            directory,
            tensors,
            {
                "fingerprint": self._fingerprint(),
                "step": self.step,
                "epochs_done": self.epochs_done,
                "best_epoch": self.best_epoch,
                "val_history": self.val_history,
            },
        )

    def restore(self, directory: Path) -> None:
        tensors, meta = read_state(directory)
        if meta["fingerprint"] != self._fingerprint():
            raise InvalidInput(
                f"The training state in {directory} belongs to a run with another model, method, seed or data. "
                "Remove it to train from the start.",
                code="state_of_another_run",
            )
        self.model.load_state_dict(_under("model/", tensors))
        parameters = dict(self.model.named_parameters())
        for key, value in _under("optimizer/", tensors).items():
            moment, name = key.split("/", 1)
            parameter = parameters[name]
            # AdamW walks its moments in memory order, which must be that of the weights (channels last in conv towers).
            like = torch.empty_like(parameter if value.shape else value, dtype=value.dtype, device=self.device)
            self.optimizer.state[parameter][moment] = like.copy_(value)
        self.step, self.epochs_done = meta["step"], meta["epochs_done"]
        self.best_epoch, self.val_history = meta["best_epoch"], meta["val_history"]
        self.best_state = _under("best/", tensors) or None
        self.best_prototypes = tensors.get("best_prototypes")

    def _fingerprint(self) -> str:
        """Of everything that decides a run's course, save for the pixels themselves."""
        what: list[Any] = [
            self.clip.name,
            [(name, list(value.shape)) for name, value in self.model.state_dict().items()],
            [self.method.name, self.hp.model_dump(), self.seed],
            [list(self.data.images.shape), self.data.labels.tolist(), self.data.val_labels.tolist(), self.texts.all],
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
