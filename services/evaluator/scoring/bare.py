"""A bare model on a data set as a classifier of its own: the zero-shot one, "a photo of a {class}.", whose folder is a
head and a card."""

import tempfile
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.classifier.head import Head
from shared.classifier.writing import write_folder
from shared.clip.loading import LoadedClip
from shared.db.models import Classifier, Dataset
from shared.ids import new_id
from shared.settings_key import setting_of
from shared.store.storage import Store

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
        write_folder(
            folder,
            clip,
            head,
            base_model=model,
            class_names=[each["name"] for each in classes],
            display_names=[each["display_name"] for each in classes],
            method=METHOD,
            hyperparameters={},
            data_fingerprint=str(dataset.fingerprint),
            seeds={"training": 0, "shots": 0, "split": dataset.split_seed},
            shots=None,
            validation="none",
            provenance={"job_id": job_id},
        )
        store.put_folder(key, folder)
