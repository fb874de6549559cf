"""Writes a classifier as a folder (layout and reader: shared/classifier/folder.py)."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import open_clip
import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from shared.classifier.card import CARD, CHANGED, HEAD, ClassifierCard, Preprocessing, sha256_file
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip, save_clip
from shared.clip.local_dir import WEIGHTS


def write_folder(
    directory: Path,
    clip: LoadedClip,
    head: Head,
    *,
    state: Mapping[str, Tensor] | None = None,
    changed: Mapping[str, Tensor] | None = None,
    base_model: str,
    class_names: Sequence[str],
    display_names: Sequence[str],
    method: str,
    hyperparameters: Mapping[str, JsonValue],
    data_fingerprint: str,
    seeds: Mapping[str, int],
    shots: int | None,
    validation: Literal["none", "few_shot", "full"],
    val_top1: float | None = None,
    best_epoch: int = 0,
    provenance: Mapping[str, JsonValue] | None = None,
) -> ClassifierCard:
    """Write the whole folder, neither atomic nor flushed: `Store.put_folder` is.

    clip: the base model; state: the model's weights, where they were trained; changed: else the tensors that differ
    from the base model's, if any (a few KB for most methods). class_names and display_names in the order of the head's
    rows; the rest goes into the card, which is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [HEAD]
    save_file({"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}, directory / HEAD)
    if state is not None:
        save_clip(clip, state, directory)
        files.append(WEIGHTS)
    elif changed:
        save_file(_own_memory(changed), directory / CHANGED)
        files.append(CHANGED)
    card = ClassifierCard(
        base_model=base_model,
        base_revision=clip.revision,
        architecture=clip.name,
        activation="quick_gelu" if clip.config["model_cfg"].get("quick_gelu") else "gelu",
        head_kind=_kind(head, (state or changed or {}).get("logit_scale", clip.model.logit_scale)),
        weights="base" if state is None else "own",
        changed=sorted(changed or ()),
        class_names=list(class_names),
        display_names=list(display_names),
        preprocessing=Preprocessing(
            size=clip.image_size,
            mean=(clip.mean[0], clip.mean[1], clip.mean[2]),
            std=(clip.std[0], clip.std[1], clip.std[2]),
            interpolation=clip.interpolation,
            resize_mode=clip.resize_mode,
        ),
        method=method,
        hyperparameters=dict(hyperparameters),
        data_fingerprint=data_fingerprint,
        seeds=dict(seeds),
        shots=shots,
        validation=validation,
        val_top1=val_top1,
        best_epoch=best_epoch,
        provenance=dict(provenance or {}),
        versions={"captune": _captune_version(), "torch": torch.__version__, "open_clip": open_clip.__version__},
        sha256={name: sha256_file(directory / name) for name in files},
    )
    (directory / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card


def _kind(head: Head, logit_scale: Tensor) -> Literal["prototypes", "linear"]:
    """Prototypes are rows of the length exp(logit_scale), and no bias."""
    lengths = head.weight.norm(dim=1)
    scale = logit_scale.detach().float().cpu().exp().squeeze()
    same = torch.allclose(lengths, scale.expand_as(lengths), rtol=1e-4)
    return "prototypes" if same and not head.bias.any() else "linear"


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


@cache
def _captune_version() -> str:
    try:
        return version("captune")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "source"
