"""A bare model on a data set as a classifier of its own: the zero-shot one, "a photo of a {class}.", whose folder is a
head and a card."""

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.classifier import CARD, HEAD, ClassifierCard, Preprocessing, sha256_file
from shared.clip import LoadedClip
from shared.db.models import Classifier, Dataset
from shared.head import Head
from shared.ids import new_id
from shared.settings_key import setting_of
from shared.storage import Store

METHOD = PROTOCOL = "zero_shot"
DETAILS: dict[str, Any] = {"train_seconds": 0.0, "trainable_parameters": 0, "captions": None}


def find(session: Session, model: str, dataset: Dataset) -> Classifier | None:
    """The model's zero-shot classifier on the data set as it is now, if there is one. An imported one does not count:
    it is zero-shot only by its own word."""
    return session.scalar(
        select(Classifier)
        .where(
            Classifier.owner == dataset.owner,
            Classifier.dataset_id == dataset.id,
            Classifier.data_fingerprint == dataset.fingerprint,
            Classifier.model == model,
            Classifier.method == METHOD,
            Classifier.job_id.is_not(None),
        )
        .order_by(Classifier.id)
        .limit(1)
    )


def add(session: Session, job_id: str, model: str, dataset: Dataset, key: str) -> Classifier:
    """A row for the folder under `key`. The caller holds the data set's row, so that there is one for each model."""
    row = Classifier(
        id=new_id("clf"),
        owner=dataset.owner,
        job_id=job_id,
        dataset_id=dataset.id,
        model=model,
        method=METHOD,
        hyperparameters={},
        shot_seed=0,
        seed=0,
        protocol=PROTOCOL,
        setting=setting_of(
            protocol=PROTOCOL,
            method=METHOD,
            model=model,
            captioner=None,
            shots=None,
            hyperparameters={},
            suffix=None,
            captions=None,
        ),
        pinned=True,
        data_fingerprint=str(dataset.fingerprint),
        storage_key=key,
        details=dict(DETAILS),
    )
    session.add(row)
    session.flush()
    return row


def save(store: Store, key: str, clip: LoadedClip, head: Head, model: str, dataset: Dataset, job_id: str) -> None:
    """Write the folder: `head` has a row for each of the data set's classes."""
    classes = dataset.classes or []
    with tempfile.TemporaryDirectory(prefix="captune-") as temporary:
        folder = Path(temporary)
        save_file({"weight": head.weight.contiguous(), "bias": head.bias.contiguous()}, folder / HEAD)
        card = ClassifierCard(
            base_model=model,
            base_revision=clip.revision,
            architecture=clip.name,
            activation="quick_gelu" if clip.config["model_cfg"].get("quick_gelu") else "gelu",
            head_kind="prototypes",
            weights="base",
            class_names=[each["name"] for each in classes],
            display_names=[each["display_name"] for each in classes],
            preprocessing=Preprocessing(
                size=clip.image_size,
                mean=(clip.mean[0], clip.mean[1], clip.mean[2]),
                std=(clip.std[0], clip.std[1], clip.std[2]),
                interpolation=clip.interpolation,
                resize_mode=clip.resize_mode,
            ),
            method=METHOD,
            hyperparameters={},
            data_fingerprint=str(dataset.fingerprint),
            seeds={"training": 0, "shots": 0, "split": dataset.split_seed},
            shots=None,
            validation="none",
            val_top1=None,
            best_epoch=0,
            provenance={"job_id": job_id},
            versions={"captune": _version(), "torch": torch.__version__, "open_clip": open_clip.__version__},
            sha256={HEAD: sha256_file(folder / HEAD)},
        )
        (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
        store.put_folder(key, folder)


def _version() -> str:
    try:
        return version("captune")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "source"
