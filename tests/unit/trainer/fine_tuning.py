"""What the tests of the training loop share: small methods of their own, features, and a run that is interrupted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.trainer.features import Features
from services.trainer.methods.base import Batch, FineTune
from services.trainer.training.data import RunTexts, TrainData
from services.trainer.training.loop import StepReport, TrainResult, train
from services.trainer.training.losses import mmft_loss
from services.trainer.training.prototypes import class_prototypes
from services.trainer.training.state import read_state
from shared.clip.loading import LoadedClip, encode_tokens

# 10 images in batches of 4 are 3 steps an epoch
HP: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "horizontal_flip": True,
    "precision": "fp32",
}
STEPS = 12


class Pairs(FineTune):
    """Images against their captions, with CLIP's loss."""

    name = "pairs"
    step_texts = "image"

    def prototype_texts(self, display: str, captions: Sequence[str]) -> list[str]:
        return [f"a photo of a {display}. {caption}" for caption in captions] or [f"a photo of a {display}."]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.text_emb is not None
        args = (batch.image_emb, batch.text_emb, batch.logit_scale, batch.labels)
        loss, parts = mmft_loss(*args, w=0.0, variant="exclude_self")
        return loss, {"clip": parts["clip"]}


class Classes(Pairs):
    """Images against one text per class, and a linear head beside it that starts at random."""

    name = "classes"
    step_texts = "class"

    def head(self, features: Features, clip: LoadedClip, seed: int) -> nn.Linear:
        return nn.Linear(features.prototypes.shape[1], len(features.class_names))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.text_emb is not None
        assert batch.head is not None
        of_texts = F.cross_entropy(batch.logit_scale * batch.image_emb @ batch.text_emb.T, batch.labels)
        of_head = F.cross_entropy(5 * batch.head(batch.image_emb), batch.labels)
        return of_texts + of_head, {"texts": of_texts.detach(), "head": of_head.detach()}


class HeadOnly(Classes):
    """No texts in the steps; the fixed prototypes keep the image embeddings near."""

    name = "head_only"
    step_texts = "none"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.head is not None
        assert batch.text_emb is None
        near = 1 - (batch.image_emb * batch.prototypes[batch.labels]).sum(1).mean()
        return F.cross_entropy(5 * batch.head(batch.image_emb), batch.labels) + near, {"near": near.detach()}


def make(method: type[FineTune], **hyperparameters: Any) -> FineTune:
    return method(method.parse({**HP, **hyperparameters}))


def features_of(clip: LoadedClip, method: FineTune, data: TrainData) -> Features:
    texts = RunTexts(clip, method, data)
    prototypes = class_prototypes(texts.table, texts.prototype_rows, lambda tokens: encode_tokens(clip.model, tokens))
    return Features(data.class_names, prototypes, float(clip.model.logit_scale.detach().exp()))


def tune(clip: LoadedClip, method: FineTune, data: TrainData, *, seed: int = 7, **options: Any) -> TrainResult:
    return train(clip, method, data, features=features_of(clip, method, data), seed=seed, device="cpu", **options)


class Stop(Exception):
    pass


def interrupted_then_resumed(
    clip: LoadedClip, method: FineTune, data: TrainData, directory: Path, stops: Sequence[int], **options: Any
) -> TrainResult:
    """Stop after each of the given steps, with a state saved there, and start anew from it; the last call finishes."""
    resume = None
    for stop in stops:

        def on_step(report: StepReport, stop: int = stop) -> None:
            if report.step == stop:
                report.snapshot(directory)
                raise Stop

        with pytest.raises(Stop):
            tune(clip, method, data, resume=resume, on_step=on_step, **options)
        resume = directory
    return tune(clip, method, data, resume=resume, **options)


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_result(a: TrainResult, b: TrainResult) -> None:
    """To the bit, but for times and memory."""
    assert_same_weights(a.model_state, b.model_state)
    assert torch.equal(a.head.weight, b.head.weight)
    assert torch.equal(a.head.bias, b.head.bias)
    assert (a.last_state is None) == (b.last_state is None)
    if a.last_state is not None and b.last_state is not None and a.last_head is not None and b.last_head is not None:
        assert_same_weights(a.last_state, b.last_state)
        assert torch.equal(a.last_head.weight, b.last_head.weight)
    names = ("best_epoch", "val_top1", "val_history", "steps", "trainable_parameters", "chosen")
    assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


def saved(prefix: str, directory: Path) -> dict[str, Tensor]:
    tensors, _ = read_state(directory)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
