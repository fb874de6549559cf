"""Classifiers with files, and evaluations as a worker does them, on a CLIP small enough for a test."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from sqlalchemy import select

from shared.classifier.card import CARD, CHANGED, HEAD, ClassifierCard, Preprocessing, sha256_file
from shared.classifier.folder import Classifier, load_classifier
from shared.clip.loading import LoadedClip, load_clip, preprocess_uint8, save_clip
from shared.clip.local_dir import WEIGHTS
from shared.core import Core
from shared.datasets.images import decode
from shared.db.models import Evaluation, Image, Job, Score
from shared.jobs.worker import Runner
from shared.schemas.evaluations import EvaluationRequest
from tests.integration.factories import FINGERPRINT, add_classifier, add_job, image_row, read_job
from tests.tiny_clip import IMAGE_SIZE

CLASSES = ["cat", "dog"]


@dataclass(frozen=True)
class Lab:
    core: Core
    clip: LoadedClip  # the model called "tiny"
    client: Callable[..., TestClient]  # client(owner, *scopes)

    def run(self, job_id: str) -> Job:
        Runner(self.core, "evaluate", "test").run(job_id)
        return read_job(self.core, job_id)

    def evaluate(self, dataset_id: str, **request: Any) -> Job:
        """A job as the API would have made it, done."""
        body = EvaluationRequest(dataset_id=dataset_id, **request).model_dump()
        job_id = add_job(self.core, "evaluate", request=body, dataset_id=dataset_id)
        return self.run(job_id)

    def add_pictures(self, dataset_id: str, split: str, count: int, first: int = 0) -> None:
        with self.core.transaction() as session:
            session.add_all(image_row(self.core, dataset_id, "anna", first + i, split) for i in range(count))

    def add_classifier(self, dataset_id: str, *, weights: str = "base", **columns: Any) -> str:
        """`weights`: "base", "projection" (base but for the last one) or "own"."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_folder(folder, self.clip, weights)
            key = f"classifiers/{dataset_id}-{weights}-{len(columns)}"
            self.core.store.put_folder(key, folder)
        return add_classifier(self.core, dataset_id, storage_key=key, model="tiny", **columns)

    def loaded(self, key: str) -> Classifier:
        with self.core.store.local_folder(key) as folder:
            return load_classifier(folder, load_base=lambda _: self.clip)

    def pixels(self, dataset_id: str, split: str) -> tuple[torch.Tensor, list[int], list[str]]:
        """Of a split, by path: pixels, labels, paths."""
        with self.core.transaction() as session:
            query = select(Image).where(Image.dataset_id == dataset_id, Image.split == split).order_by(Image.path)
            images = session.scalars(query).all()
        found = [preprocess_uint8(decode(self.core.store.read_blob(image.sha256)), self.clip) for image in images]
        return torch.stack(found), [CLASSES.index(i.class_name) for i in images], [i.path for i in images]

    def standing(self, **key: str) -> tuple[list[Evaluation], dict[str, float]]:
        """Evaluation rows and scores of (classifier_id, dataset_id, split, head)."""
        with self.core.transaction() as session:
            rows = session.scalars(select(Evaluation).filter_by(**key)).all()
            scores = session.execute(select(Score.metric, Score.value).filter_by(**key)).all()
        assert len({name for name, _ in scores}) == len(scores)
        return list(rows), {name: value for name, value in scores}


def write_folder(folder: Path, clip: LoadedClip, weights: str = "base", classes: list[str] = CLASSES) -> ClassifierCard:
    rng = torch.Generator().manual_seed(3)
    width = int(clip.config["model_cfg"]["embed_dim"])
    head = {"weight": 5 * torch.randn(len(classes), width, generator=rng), "bias": torch.zeros(len(classes))}
    save_file(head, folder / HEAD)
    names, changed = [HEAD], []
    if weights == "own":
        state = clip.model.state_dict()
        moved = {k: v.roll(1) if k == "visual.proj" else v for k, v in state.items()}
        save_clip(clip, moved, folder)
        names.append(WEIGHTS)
    if weights == "projection":
        save_file({"visual.proj": clip.model.visual.proj.detach().roll(1, 0)}, folder / CHANGED)
        names.append(CHANGED)
        changed = ["visual.proj"]
    card = card_of(
        base_revision=clip.revision,
        weights="own" if weights == "own" else "base",
        changed=changed,
        class_names=classes,
        display_names=classes,
        sha256={name: sha256_file(folder / name) for name in names},
    )
    (folder / CARD).write_text(json.dumps(card.model_dump()))
    return card


def card_of(**changes: Any) -> ClassifierCard:
    values: dict[str, Any] = {
        "base_model": "tiny",
        "base_revision": "0" * 32,
        "architecture": "tiny",
        "activation": "gelu",
        "head_kind": "linear",
        "weights": "own",
        "class_names": CLASSES,
        "display_names": CLASSES,
        "preprocessing": Preprocessing(
            size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", resize_mode="shortest"
        ),
        "method": "flyp",
        "hyperparameters": {"epochs": 1},
        "data_fingerprint": FINGERPRINT,
        "seeds": {"training": 4, "shots": 5},
        "shots": 2,
        "validation": "full",
        "val_top1": 0.5,
        "best_epoch": 1,
        "versions": {"captune": "0"},
        "sha256": {},
    }
    return ClassifierCard(**values | changes)


def open_model(root: Path, cache: Path) -> LoadedClip:
    return load_clip("tiny", cache, [root])
