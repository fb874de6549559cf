"""Rows as the services leave them behind, so that a test need not run what came before."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image as Picture

from services.evaluator.scoring import predictions
from shared.core import Core
from shared.db.models import (
    Caption,
    CaptionJobItem,
    Checkpoint,
    Classifier,
    Dataset,
    Evaluation,
    Image,
    Job,
    JobEvent,
    RunGroup,
    Score,
)
from shared.ids import new_id
from shared.jobs import ledger
from shared.leaderboard_version import bump
from shared.schemas.captions import EXCLUDED_BY_DEFAULT
from shared.settings_key import setting_of

PREFIX = {"ingest": "ds", "caption": "cap", "fine_tune": "ft", "evaluate": "eval"}
FINGERPRINT = "f" * 64


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Picture.new("RGB", (16, 16), (shade, 255 - shade, 7)).save(out, "PNG")
    return out.getvalue()


def archive(classes: Sequence[str] = ("cat", "dog"), per_class: int = 6) -> bytes:
    """A zip of `class/file`, every picture different; the same bytes whenever it is made."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for i, name in enumerate(classes):
            for j in range(per_class):
                packed.writestr(zipfile.ZipInfo(f"{name}/{j}.png"), png(i * per_class + j))
    return out.getvalue()


def add_job(
    core: Core,
    kind: str = "caption",
    *,
    owner: str = "anna",
    request: dict[str, Any] | None = None,
    dataset_id: str | None = None,
    **columns: Any,
) -> str:
    """A job through `ledger.create`, then changed as asked; a queued one is on Redis's list, as after any request."""
    id = new_id(PREFIX[kind])
    with core.transaction() as session:
        job = ledger.create(
            session, id=id, kind=kind, owner=owner, request=request or {}, dataset_id=dataset_id or new_id("ds")
        )
        for name, value in columns.items():
            setattr(job, name, value)
        if job.status != "queued":
            session.info["queued"] = []
    return id


def add_dataset(
    core: Core, owner: str = "anna", *, status: str = "succeeded", images: int = 0, val: int = 0, **columns: Any
) -> str:
    """An ingested data set with the classes cat and dog; `images` of each class in train, `val` of each in val."""
    id = new_id("ds")
    with core.transaction() as session:
        session.add(Job(id=id, kind="ingest", owner=owner, dataset_id=id, status=status, request={}))
        session.flush()
        values = {
            "name": "pets",
            "domain": "pets",
            "archive_key": f"uploads/{id}",
            "archive_sha256": "0" * 64,
            "archive_bytes": 1,
            "split_seed": 0,
            "val_fraction": 0.1,
            "test_fraction": 0.2,
            "classes": [{"name": name, "display_name": name} for name in ("cat", "dog")],
            "fingerprint": FINGERPRINT,
        }
        session.add(Dataset(id=id, owner=owner, **values | columns))
        session.flush()
        for i in range(2 * images):
            session.add(image_row(core, id, owner, i))
        for i in range(2 * images, 2 * (images + val)):
            session.add(image_row(core, id, owner, i, "val"))
    return id


def image_row(core: Core, dataset_id: str, owner: str, number: int, split: str = "train") -> Image:
    data = png(number)
    name = ("cat", "dog")[number % 2]
    return Image(
        id=new_id("img"),
        owner=owner,
        dataset_id=dataset_id,
        path=f"{name}/{number}.png",
        class_name=name,
        split=split,
        sha256=core.store.put_blob(data),
        media_type="image/png",
        width=16,
        height=16,
        bytes=len(data),
    )


def caption_request(dataset_id: str, split: str = "train") -> dict[str, Any]:
    return {"dataset_id": dataset_id, "split": split}


def add_caption(
    core: Core,
    image: Image,
    job_id: str,
    text: str = "a soft coat",
    key: str = "k",
    *,
    job_flags: Sequence[str] = (),
    agreement: dict[str, Any] | None = None,
    **columns: Any,
) -> str:
    """`job_flags` and `agreement`: what the job says of it; further columns are the caption's."""
    id = new_id("txt")
    values = {"characteristic": "visual", "clip_tokens": 12, "provenance": {"engine": "attributes"}}
    with core.transaction() as session:
        session.add(
            Caption(
                id=id,
                owner=image.owner,
                dataset_id=image.dataset_id,
                image_id=image.id,
                key=key,
                text=text,
                **values | columns,
            )
        )
    share_caption(core, id, job_id, job_flags, agreement)
    return id


def share_caption(
    core: Core, caption_id: str, job_id: str, job_flags: Sequence[str] = (), agreement: dict[str, Any] | None = None
) -> None:
    """Makes a caption the job's, too."""
    with core.transaction() as session:
        session.add(CaptionJobItem(job_id=job_id, caption_id=caption_id, flags=list(job_flags), agreement=agreement))


def read_item(core: Core, caption_id: str, job_id: str) -> CaptionJobItem:
    with core.transaction() as session:
        return session.get_one(CaptionJobItem, (job_id, caption_id))


def fine_tune_request(dataset_id: str, **changes: Any) -> dict[str, Any]:
    """What the trainer's API stores for a job."""
    base: dict[str, Any] = {
        "model": "starter",
        "dataset_id": dataset_id,
        "caption_job_id": None,
        "exclude_flags": list(EXCLUDED_BY_DEFAULT),
        "method": {"type": "flyp", "preset": "default", "hyperparameters": {}},
        "shots": None,
        "shot_seed": 0,
        "seed": 0,
        "validation": "full",
        "checkpoints": "best",
        "suffix": None,
        "tags": [],
        "metadata": {},
    }
    return base | changes


def add_group(core: Core, dataset_id: str, *, owner: str = "anna", name: str = "sweep") -> str:
    id = new_id("grp")
    with core.transaction() as session:
        session.add(RunGroup(id=id, owner=owner, dataset_id=dataset_id, name=name))
    return id


def add_classifier(
    core: Core,
    dataset_id: str,
    scores: Mapping[str, float] | None = None,
    *,
    owner: str = "anna",
    split: str = "test",
    head: str = "own",
    scored_on: str | None = None,
    scored_as: str | None = FINGERPRINT,
    correct: Sequence[bool] = (),
    **columns: Any,
) -> str:
    """A classifier with its fine-tuning job and, where there are scores, its evaluation: on the data set `scored_on` if
    that is another, as it was when its fingerprint was `scored_as` (None: scores from before evaluations were kept);
    `correct`: which images it got right."""
    request = fine_tune_request(dataset_id)
    group_id = columns.get("group_id")
    job_id = add_job(
        core, "fine_tune", owner=owner, request=request, dataset_id=dataset_id, status="succeeded", group_id=group_id
    )
    id = new_id("clf")
    values = {
        "model": "starter",
        "method": "flyp",
        "hyperparameters": {"epochs": 1},
        "shot_seed": 0,
        "seed": 0,
        "protocol": "full",
        "data_fingerprint": FINGERPRINT,
        "storage_key": f"classifiers/{id}",
        "details": {"train_seconds": 2.0},
    }
    row: dict[str, Any] = {"captioner": None, "shots": None, "suffix": None, **values, **columns}
    chosen = ("protocol", "method", "model", "captioner", "shots", "hyperparameters", "suffix")
    row.setdefault(
        "setting", setting_of(**{name: row[name] for name in chosen}, captions=row["details"].get("captions"))
    )
    with core.transaction() as session:
        session.add(Classifier(**{"id": id, "owner": owner, "job_id": job_id, "dataset_id": dataset_id, **row}))
    if scores:
        evaluation = add_job(
            core,
            "evaluate",
            owner=owner,
            request={"classifier_id": id, "split": split},
            dataset_id=scored_on or dataset_id,
            status="succeeded",
        )
        found = {"classifier_id": id, "dataset_id": scored_on or dataset_id, "split": split, "head": head}
        bits = {"images": len(correct), "correct": np.packbits(np.array(correct, bool)).tobytes()}
        with core.transaction() as session:
            if scored_as is not None:
                kept = {"owner": owner, "data_fingerprint": scored_as, "predictions_key": evaluation, **bits}
                session.add(Evaluation(id=evaluation, **found, **kept))
            for metric, value in scores.items():
                session.add(Score(**found, metric=metric, value=value, evaluation_id=evaluation))
            bump(session, scored_on or dataset_id)
    return id


def add_checkpoint(core: Core, job_id: str, step: int = 1, kind: str = "resume", key: str = "k") -> str:
    id = new_id("ckpt")
    with core.transaction() as session:
        session.add(Checkpoint(id=id, job_id=job_id, kind=kind, step=step, epoch=1, storage_key=key, metrics={}))
    return id


def read_job(core: Core, job_id: str) -> Job:
    with core.transaction() as session:
        return session.get_one(Job, job_id)


def change_job(core: Core, job_id: str, **columns: Any) -> None:
    """What time or an accident would do."""
    with core.transaction() as session:
        job = session.get_one(Job, job_id)
        for name, value in columns.items():
            setattr(job, name, value)


def events_of(core: Core, job_id: str) -> list[JobEvent]:
    with core.transaction() as session:
        rows = session.query(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
        return list(rows)


def types_of(core: Core, job_id: str) -> list[str]:
    """Event types in order; that the numbers have no gap is checked on the way."""
    events = events_of(core, job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]


LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def add_predictions(core: Core, evaluation_id: str, classifier_id: str, dataset_id: str, owner: str = "anna") -> None:
    """What a finished evaluation of the val split keeps, of one image."""
    key = f"predictions/{evaluation_id}-1.parquet"
    kept = predictions.Kept(["img_1"], ["cat/1.png"], np.array([0]), np.eye(1, 2, dtype=np.float32), ["cat", "dog"])
    predictions.write(core.store, key, kept)
    with core.transaction() as session:
        session.add(
            Evaluation(
                id=evaluation_id,
                owner=owner,
                classifier_id=classifier_id,
                dataset_id=dataset_id,
                split="val",
                head="own",
                data_fingerprint=FINGERPRINT,
                predictions_key=key,
                images=1,
                correct=b"\x80",
            )
        )
