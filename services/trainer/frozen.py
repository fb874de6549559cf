"""Runs of the methods that do not train the model step by step: zero-shot ones, and those on frozen features."""

import time

import torch
import torch.nn.functional as F

from services.trainer.features import Features
from services.trainer.methods.base import Fit, Frozen, Method
from services.trainer.threads import threads_for
from services.trainer.training.memory import forget_peak, peak_memory
from services.trainer.training.reports import TrainResult
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip
from shared.clip.projection import last_projection
from shared.errors import InvalidInput


def fit(clip: LoadedClip, method: Method, features: Features, seed: int) -> TrainResult:
    """A classifier of a method of kind `zero_shot` or `frozen`, in the form of a training's result. `features`: the
    prototypes of the method's texts; for `frozen` the training images' too, and the unprojected ones where the method
    asks for them (those alone will do); the same of the validation images where there are any. The model itself is not
    touched. Raises InvalidInput where the data don't allow the method."""
    start = time.perf_counter()
    forget_peak(torch.device("cpu"))
    if len(features.class_names) < 2:
        raise InvalidInput("A classifier needs at least 2 classes; the data set has 1.", code="too_little_data")
    if isinstance(method, Frozen):
        with threads_for(len(features.train_labels)):
            found = method.fit(features, clip, seed)
    elif method.kind == "zero_shot":
        found = Fit(Head.of_prototypes(features.prototypes, features.logit_scale))
    else:
        raise TypeError(f"{method.name} is trained by services/trainer/training/loop.py")
    val_top1 = _val_top1(clip, features, found)
    seconds = time.perf_counter() - start
    return TrainResult(
        model_state=found.changed,
        head=found.head,
        best_epoch=0,
        val_top1=val_top1,
        val_history=[],
        steps=0,
        seconds=seconds,
        images_per_s=len(features.train_labels) / seconds,
        trainable_parameters=found.trainable_parameters,
        peak_memory_bytes=peak_memory(torch.device("cpu")),
        chosen=found.chosen,
    )


def _val_top1(clip: LoadedClip, features: Features, found: Fit) -> float | None:
    embeddings = features.val
    # What changed is the last projection: no other part of the model may be, for its features are frozen.
    if found.changed and len(features.val_unprojected):
        projection = last_projection(clip)
        weight = found.changed[projection.name].to(projection.weight)
        unprojected = features.val_unprojected.to(projection.weight)
        embeddings = F.normalize(projection.project(unprojected, weight), dim=-1).cpu()
    return found.head.top1(embeddings, features.val_labels) if len(embeddings) else None
