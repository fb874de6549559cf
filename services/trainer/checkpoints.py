"""Writes a trained classifier as a folder (layout and reader: shared/classifier.py)."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import open_clip
import torch
from pydantic import JsonValue
from safetensors.torch import save_file

from services.trainer.loop import TrainResult
from services.trainer.methods.base import Method
from services.trainer.state import fsync
from shared.classifier import CARD, PROTOTYPES, ClassifierCard, Preprocessing, sha256_file
from shared.clip import LoadedClip, save_clip
from shared.local_dir import WEIGHTS


def write_classifier(
    directory: Path,
    clip: LoadedClip,
    method: Method,
    result: TrainResult,
    *,
    base_model: str,
    class_names: Sequence[str],
    display_names: Sequence[str],
    data_fingerprint: str,
    seeds: Mapping[str, int],
    shots: int | None,
    validation: Literal["none", "few_shot", "full"],
    provenance: Mapping[str, JsonValue] | None = None,
) -> ClassifierCard:
    """Write the whole folder and flush it to disk. Not atomic: write into a temporary directory and rename it.

    clip: the base model that `train` was given; class_names and display_names in the order of the prototypes' rows;
    the rest goes into the card, which is returned.
    """
    save_clip(clip, result.model_state, directory)
    save_file({"prototypes": result.prototypes.contiguous()}, directory / PROTOTYPES)
    card = ClassifierCard(
        base_model=base_model,
        architecture=clip.name,
        activation="quick_gelu" if clip.config["model_cfg"].get("quick_gelu") else "gelu",
        class_names=list(class_names),
        display_names=list(display_names),
        preprocessing=Preprocessing(
            size=clip.image_size,
            mean=(clip.mean[0], clip.mean[1], clip.mean[2]),
            std=(clip.std[0], clip.std[1], clip.std[2]),
            interpolation=clip.interpolation,
            resize_mode=clip.resize_mode,
        ),
        method=method.name,
        hyperparameters=method.hyperparameters.model_dump(mode="json"),
        data_fingerprint=data_fingerprint,
        seeds=dict(seeds),
        shots=shots,
        validation=validation,
        val_top1=result.val_top1,
        best_epoch=result.best_epoch,
        provenance=dict(provenance or {}),
        versions={"captune": _captune_version(), "torch": torch.__version__, "open_clip": open_clip.__version__},
        sha256={name: sha256_file(directory / name) for name in (WEIGHTS, PROTOTYPES)},
    )
    (directory / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in (directory / PROTOTYPES, directory / CARD, directory):
        fsync(path)
    return card


def _captune_version() -> str:
    try:
        return version("captune")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "source"
