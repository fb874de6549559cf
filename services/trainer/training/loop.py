"""The training loop every fine-tune shares: trains a copy of a CLIP model and keeps the best epoch.

Reading order: `train` -> `Run.run` -> `Run._step` -> gradients.py -> encoding.py. A run is a function of (model,
method, data, seed): every draw is derived from the seed and the step (randomness.py), so a run resumed from a snapshot
ends, on the CPU, with the very weights of one that was never interrupted. What is trained is parameters.py's, the
optimiser and its schedule optim.py's, the batches feeding.py's, averages averaging.py's, validation scoring.py's;
several processes: parallel.py.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from services.trainer.features import Features
from services.trainer.methods.base import FineTune
from services.trainer.processes.peers import Alone
from services.trainer.training.averaging import EMA, choose_share
from services.trainer.training.data import RunTexts, TrainData
from services.trainer.training.feeding import Feed
from services.trainer.training.gradients import Gradients
from services.trainer.training.memory import forget_peak, freed_blocks_kept, peak_memory
from services.trainer.training.optim import Optimizer
from services.trainer.training.parameters import Trained
from services.trainer.training.randomness import derived_seed
from services.trainer.training.reports import Diverged, EpochReport, Figures, StepReport, TrainResult
from services.trainer.training.scoring import Scorer
from services.trainer.training.state import read_state, write_state
from shared.clip.loading import LoadedClip
from shared.errors import InvalidInput

__all__ = ["Diverged", "EpochReport", "Figures", "Run", "StepReport", "TrainResult", "train"]

OnStep = Callable[[StepReport], None]
OnEpoch = Callable[[EpochReport], None]
_DUE_SECONDS = 0.5  # between reports whose figures are worth fetching
_CHECK_STEPS = 20  # between looks at whether the loss is finite, where looking means waiting for a device


def train(
    clip: LoadedClip,
    method: FineTune,
    data: TrainData,
    *,
    features: Features,
    seed: int,
    resume: Path | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "auto",
    keep_last: bool = False,
    processes: int = 1,
) -> TrainResult:
    """Fine-tune. `clip` itself is left as it is.

    features: of the base model and the method's prototype texts (`train` and `val` where the method needs them).
    resume: a directory that a report's `snapshot` wrote in a run of the same arguments. Callbacks may raise anything to
    stop; it passes through. device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ... keep_last: return
    the last epoch's weights too. processes: on as many GPUs, or as many processes of a CPU, each encoding its share of
    every batch; `device` then names the kind.
    Raises InvalidInput on unusable data, a snapshot of another run, or one image too large for the memory; Diverged on
    a loss that is no longer finite.
    """
    data.check(clip, method)
    on_step, on_epoch = on_step or _ignore, on_epoch or _ignore
    if processes > 1:
        from services.trainer.processes.parallel import train_in_processes

        return train_in_processes(
            clip,
            method,
            data,
            features=features,
            seed=seed,
            resume=resume,
            on_step=on_step,
            on_epoch=on_epoch,
            device=device,
            keep_last=keep_last,
            processes=processes,
        )
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    with Run(clip, method, data, features, seed, place, keep_last=keep_last) as run:
        if resume is not None:
            run.restore(resume)
        return run.run(on_step, on_epoch)


def _ignore(report: object) -> None:
    return None


class Run:
    """One run in this process, alone or as one of `peers`. A context: outside, the process's random numbers go on as if
    nothing had been."""

    def __init__(
        self,
        clip: LoadedClip,
        method: FineTune,
        data: TrainData,
        features: Features,
        seed: int,
        device: torch.device,
        *,
        keep_last: bool = False,
        peers: Alone | None = None,
    ) -> None:
        self.clip, self.method, self.data, self.features = clip, method, data, features
        self.seed, self.device, self.hp, self.keep_last = seed, device, method.hyperparameters, keep_last
        self.peers = peers or Alone()
        self.step = 0  # optimiser steps done
        self.epochs_done = 0  # validated ones; one behind `step` when stopped right after an epoch's last step
        self.kept: dict[str, Tensor] | None = None  # parameters of the best epoch, without validation of the last
        self.kept_epoch = 0
        self.val_history: list[float] = []
        self.images_seen, self.train_seconds = 0, 0.0
        self._began = self._due_at = time.perf_counter()

    def __enter__(self) -> Self:
        with ExitStack() as inside:
            inside.enter_context(freed_blocks_kept())
            devices = [self.device] if self.device.type == "cuda" else []
            inside.enter_context(torch.random.fork_rng(devices=devices))
            forget_peak(self.device)
            self.texts = RunTexts(self.clip, self.method, self.data)
            feed = Feed(self.data, self.texts, self.method, self.seed, self.device, self.peers)
            self.feed = inside.enter_context(feed)
            torch.manual_seed(derived_seed(self.seed, "head"))
            head = self.method.head(self.features, self.clip, self.seed)
            self.trained = Trained(self.clip, self.method, head, self.seed, self.device)
            self.optimizer = Optimizer(self.trained.parameters, self.hp, feed.total_steps, self.device)
            prototypes = self.features.prototypes.to(self.device)
            self.gradients = Gradients(
                self.clip, self.method, self.trained, self.optimizer, feed, prototypes, self.seed
            )
            autocast = self.gradients.autocast
            self.scorer = Scorer(self.clip, self.data, self.trained, feed, autocast, prototypes.shape[1])
            self.ema = EMA(self.trained.parameters, self.hp.ema) if self.hp.ema is not None else None
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def run(self, on_step: OnStep, on_epoch: OnEpoch) -> TrainResult:
        while True:
            if self.step == (self.epochs_done + 1) * self.feed.steps_per_epoch:
                with self._last_good():
                    report = self._end_epoch()
                on_epoch(report)
            if self.step == self.feed.total_steps:
                return self._result()
            with self._last_good():
                after = self._step()
            on_step(after)

    @contextmanager
    def _last_good(self) -> Iterator[None]:
        try:
            yield
        except Diverged as error:
            error.last_good = self._result() if self.kept is not None else None
            raise

    def _step(self) -> StepReport:
        start = time.perf_counter()
        draw = self.feed.draw(self.step)
        self.gradients.compute(draw, self.step)
        lr, norm = self.optimizer.step(self.step)
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        self.images_seen += len(draw.labels)
        last = self.step % self.feed.steps_per_epoch == 0
        if last or self.step % _CHECK_STEPS == 0:
            self.gradients.check()  # waits for the device, so the time below is true
        now = time.perf_counter()
        self.train_seconds += now - start
        due = last or now >= self._due_at
        if due:
            self._due_at = now + _DUE_SECONDS
        return StepReport(
            step=self.step,
            total_steps=self.feed.total_steps,
            epoch=(self.step - 1) // self.feed.steps_per_epoch + 1,
            epochs=self.hp.epochs,
            due=due,
            micro_batch=self.gradients.micro_batch,
            snapshot=self.save,
            fetch=self._figures(lr),
            fetch_grad_norm=self._grad_norm(norm),
        )

    def _figures(self, lr: float | Tensor) -> Callable[[], Figures]:
        loss, scale, parts = self.gradients.loss, self.gradients.scale, self.gradients.parts

        def fetch() -> Figures:
            rate = torch.as_tensor(lr, dtype=torch.float64)
            values = [value.double().to(loss.device) for value in (rate, scale, loss, *parts.values())]
            first, second, third, *of_parts = torch.stack(values).tolist()  # one wait for the device
            return Figures(
                loss=third,
                parts=dict(zip(parts, of_parts, strict=True)),
                lr=first,
                logit_scale=second,
                images_per_s=self._images_per_s(),
            )

        return fetch

    def _grad_norm(self, clipped_from: Tensor | None) -> Callable[[], float]:
        step = self.step

        def fetch() -> float:
            if clipped_from is None and self.step != step:
                raise RuntimeError(f"the gradients of step {step} are gone: read grad_norm in the callback")
            return float(self.optimizer.grad_norm() if clipped_from is None else clipped_from)

        return fetch

    def _end_epoch(self) -> EpochReport:
        """Validate, and keep the parameters if they are the best so far; a tie keeps the earlier."""
        values = self.ema.values if self.ema is not None else _detached(self.trained.parameters)
        if not math.isfinite(nn.utils.get_total_norm(list(values.values()))):
            step, total = self.step, self.feed.total_steps
            raise Diverged.at(f"Weights are not finite after step {step} of {total}", self.method)
        self.epochs_done += 1
        val = self.scorer.accuracy(values)
        if val is None or val > max(self.val_history, default=-1.0):
            self.kept_epoch = self.epochs_done
            if self.kept is None:
                self.kept = self.trained.copy()
            _fill(self.kept, values)
        if val is not None:
            self.val_history.append(val)
        return EpochReport(
            epoch=self.epochs_done,
            epochs=self.hp.epochs,
            step=self.step,
            total_steps=self.feed.total_steps,
            val_top1=val,
            best_epoch=self.kept_epoch,
            best_val_top1=max(self.val_history, default=None),
            snapshot=self.save,
        )

    def _result(self) -> TrainResult:
        assert self.kept is not None
        kept, share, val = self.kept, 1.0, max(self.val_history, default=None)
        chosen: dict[str, Any] = {}
        if self.hp.wise_ft is not None:
            share, val, chosen["wise_ft"] = choose_share(self.hp.wise_ft, lambda s: self.scorer.accuracy(kept, s))
        if self.gradients.micro_batch != self.hp.micro_batch:
            chosen["micro_batch"] = self.gradients.micro_batch
        state, head = self.scorer.classifier(kept, share)
        last_state, last_head = None, None
        if self.keep_last:
            last_state, last_head = self.scorer.classifier(self.ema.values if self.ema is not None else None)
        return TrainResult(
            model_state=state,
            head=head,
            best_epoch=self.kept_epoch,
            val_top1=val,
            val_history=self.val_history,
            steps=self.step,
            seconds=time.perf_counter() - self._began,
            images_per_s=self._images_per_s(),
            trainable_parameters=sum(parameter.numel() for parameter in self.trained.parameters.values()),
            peak_memory_bytes=self.peers.highest(peak_memory(self.device)),
            chosen=chosen,
            last_state=last_state,
            last_head=last_head,
        )

    def _images_per_s(self) -> float:
        return self.images_seen / self.train_seconds if self.train_seconds else 0.0

    def save(self, directory: Path) -> None:
        """Write what `restore` needs into `directory`, replacing what is there in one rename."""
        with self._last_good() if self.peers.count == 1 else nullcontext():  # one of several can't encode alone
            self.gradients.check()
        moments, scaler = self.optimizer.state()
        groups = {
            "trained": _detached(self.trained.parameters),
            "optimizer": moments,
            "average": self.ema.values if self.ema is not None else {},
            "kept": self.kept or {},
        }
        write_state(
            directory,
            {f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()},
            {
                "fingerprint": self._fingerprint(),
                "step": self.step,
                "epochs_done": self.epochs_done,
                "kept_epoch": self.kept_epoch,
                "val_history": self.val_history,
                "micro_batch": self.gradients.micro_batch,
                "scaler": scaler,
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
        self.step, self.epochs_done = meta["step"], meta["epochs_done"]
        self.gradients.micro_batch = meta["micro_batch"]
        self.kept_epoch, self.val_history = meta["kept_epoch"], meta["val_history"]
        _fill(_detached(self.trained.parameters), _under("trained/", tensors))
        self.optimizer.load(_under("optimizer/", tensors), meta["scaler"])
        if self.ema is not None:
            _fill(self.ema.values, _under("average/", tensors))
        if kept := _under("kept/", tensors):
            self.kept = self.trained.copy()
            _fill(self.kept, kept)

    def _fingerprint(self) -> str:
        """Of everything that decides a run's course, save for the pixels themselves."""
        what: list[Any] = [
            [self.clip.name, self.clip.revision],
            [self.method.name, self.hp.model_dump(), self.seed],
            [list(self.data.images.shape), self.data.labels.tolist(), self.data.val_labels.tolist(), self.texts.all],
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _detached(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _fill(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, place in places.items():
        place.copy_(values[name])
