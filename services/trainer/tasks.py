"""The fine-tuning job: gather the run's data, train (loop.py), save the classifier, and queue its evaluation."""

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.trainer import methods
from services.trainer.checkpoints import write_classifier
from services.trainer.data import TrainData
from services.trainer.loop import EpochReport, StepReport, TrainResult, train
from services.trainer.methods.base import Method
from services.trainer.settings import TrainerSettings
from shared.clip import LoadedClip, load_clip
from shared.datasets.lookup import draw_shots, split_images
from shared.datasets.tensors import load_images
from shared.db.models import Caption, CaptionJobItem, Checkpoint, Classifier, Dataset, Image, Job
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.jobs import HandedBack, Paused, ledger
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.fine_tuning import FineTuningRequest

_warm_clip = lru_cache(maxsize=2)(load_clip)  # a worker keeps its base models between jobs; training copies them


@dataclass
class _Sources:
    """Rows that decide the run's data; read once, in one transaction."""

    dataset: Dataset
    train: list[Image] = field(default_factory=list)
    val: list[Image] = field(default_factory=list)
    fewer: dict[str, int] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)  # by image id
    left_out: Counter[str] = field(default_factory=Counter)  # captions by the flag (or "by_hand") that excluded them
    captioner: str | None = None
    measured_for: str | None = None  # the CLIP whose tokenizer measured the captions
    recipe: dict[str, Any] | None = None  # how the captions were asked for: it tells settings apart on the leaderboard

    @property
    def class_names(self) -> list[str]:
        return [c["name"] for c in self.dataset.classes or ()]

    @property
    def display_names(self) -> list[str]:
        return [c["display_name"] for c in self.dataset.classes or ()]


def fine_tune(claim: Claim) -> Finish:
    request = FineTuningRequest.model_validate(claim.request)
    settings = TrainerSettings()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    method = methods.build(request.method.type, request.method.hyperparameters)
    with claim.core.transaction() as session:
        sources = _gather(session, request, method)
    _warn(claim, request, sources)

    claim.progress("loading the model", 0, 1)
    core = claim.core.settings
    clip = _warm_clip(request.model, core.model_cache, tuple(core.model_roots))
    saver = _Saver(claim, settings.checkpoint_seconds)
    data = _load(claim, clip, sources)
    with saver.newest() as resume:
        result = train(
            clip,
            method,
            data,
            seed=request.seed,
            resume=resume,
            on_step=saver.on_step,
            on_epoch=saver.on_epoch,
            device=settings.device,
        )
    seconds = saver.seconds
    claim.progress("saving", 0, 1)
    key = f"classifiers/{claim.id}/{claim.attempt}"
    with tempfile.TemporaryDirectory(prefix="captune-") as folder:
        write_classifier(
            Path(folder),
            clip,
            method,
            result,
            base_model=request.model,
            class_names=sources.class_names,
            display_names=sources.display_names,
            data_fingerprint=str(sources.dataset.fingerprint),
            seeds={"training": request.seed, "shots": request.shot_seed, "split": sources.dataset.split_seed},
            shots=request.shots,
            validation=request.validation,
            provenance={"job_id": claim.id, "caption_job_id": request.caption_job_id, "captioner": sources.captioner},
        )
        claim.core.store.put_folder(key, Path(folder))
    return lambda session: _finish(session, claim, request, method, sources, result, key, seconds)


def _gather(session: Session, request: FineTuningRequest, method: Method) -> _Sources:
    found = _Sources(session.get_one(Dataset, request.dataset_id))
    if not method.trains and not method.needs_captions:
        return found
    found.train, found.fewer = draw_shots(
        split_images(session, request.dataset_id, "train"), request.shots, request.shot_seed
    )
    if request.validation != "none":
        shots = request.shots if request.validation == "few_shot" else None
        found.val, _ = draw_shots(split_images(session, request.dataset_id, "val"), shots, request.shot_seed)
        if not found.val:
            raise InvalidInput(
                f"validation '{request.validation}' needs a val split, and this data set has none: choose 'none', or "
                "upload it again with val_fraction above 0",
                code="no_val_split",
                param="validation",
            )
    if method.needs_captions and request.caption_job_id is not None:
        _gather_captions(session, request, found)
    return found


def _gather_captions(session: Session, request: FineTuningRequest, found: _Sources) -> None:
    """The usable captions of the training images; what the policy leaves out is counted under its first reason."""
    job = session.get_one(Job, request.caption_job_id)
    items = select(CaptionJobItem.caption_id).where(CaptionJobItem.job_id == job.id)
    query = select(Caption.image_id, Caption.text, Caption.flags + CaptionJobItem.flags, Caption.excluded)
    query = query.join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id).where(CaptionJobItem.job_id == job.id)
    wanted = {image.id for image in found.train}
    for image_id, text, flags, excluded in session.execute(query.order_by(Caption.image_id, Caption.key)):
        if image_id not in wanted:
            continue
        reason = "by_hand" if excluded else next((flag for flag in request.exclude_flags if flag in flags), None)
        if reason is None:
            found.captions.setdefault(image_id, []).append(text)
        else:
            found.left_out[reason] += 1
    captioner = (job.result or {})["captioner"]
    found.captioner, found.measured_for = captioner["revision"], job.request.get("clip_model")
    asked = ("characteristics", "words", "domain", "temperature", "samples_per_prompt", "shear_tokens")
    by_hand = select(Caption.id, Caption.text, Caption.excluded).where(
        Caption.id.in_(items), Caption.original_text.is_not(None) | Caption.excluded
    )
    changes = [tuple(row) for row in session.execute(by_hand.order_by(Caption.id))]
    found.recipe = {name: job.request[name] for name in asked if name in job.request} | {
        "exclude_flags": sorted(request.exclude_flags),
        # Captions that were reviewed are another setting than the model's own, and so are those reviewed otherwise.
        "review": hashlib.sha256(json.dumps(changes).encode()).hexdigest()[:12] if changes else None,
    }


def _warn(claim: Claim, request: FineTuningRequest, sources: _Sources) -> None:
    if sources.fewer:
        detail = ", ".join(f"{name} ({n})" for name, n in sorted(sources.fewer.items())[:20])
        message = f"these classes have fewer than {request.shots} training images, all of them are used: {detail}"
        claim.event("warning.fewer_shots", message, {"classes": sources.fewer}, level="warning")
    if left_out := sources.left_out.total():
        reasons = ", ".join(f"{reason} {n}" for reason, n in sources.left_out.most_common())
        message = f"{left_out} captions are left out ({reasons}); 'exclude_flags' of the job decides which"
        claim.event("warning.captions_left_out", message, dict(sources.left_out), level="warning")
    if sources.measured_for not in (None, request.model):
        message = (
            f"the captions were measured for '{sources.measured_for}', so '{request.model}' may cut some of them; "
            "a caption job with this 'clip_model' reuses the captions and measures them anew"
        )
        claim.event("warning.captions_of_another_clip", message, level="warning")
    if request.caption_job_id is not None:
        bare = [image.path for image in sources.train if image.id not in sources.captions]
        if bare:
            message = f"{len(bare)} of {len(sources.train)} training images have no caption: their class name stands in"
            claim.event("warning.images_without_caption", message, {"paths": bare[:100]}, level="warning")


def _load(claim: Claim, clip: LoadedClip, sources: _Sources) -> TrainData:
    labels = {name: i for i, name in enumerate(sources.class_names)}
    total = len(sources.train) + len(sources.val)

    def loaded(split: list[Image], before: int) -> torch.Tensor:
        def on_chunk(done: int) -> None:
            claim.check()
            claim.progress("loading images", before + done, total)

        return load_images(claim.core.store, split, clip, on_chunk)

    return TrainData(
        images=loaded(sources.train, 0),
        labels=torch.tensor([labels[image.class_name] for image in sources.train], dtype=torch.int64),
        captions=[sources.captions.get(image.id, []) for image in sources.train],
        class_names=sources.display_names,
        val_images=loaded(sources.val, len(sources.train)),
        val_labels=torch.tensor([labels[image.class_name] for image in sources.val], dtype=torch.int64),
    )


class _Saver:
    """Reports the run's progress and saves its state: every so often, and when it must stop but will go on."""

    def __init__(self, claim: Claim, every_seconds: float) -> None:
        self.claim, self.every_seconds = claim, every_seconds
        self.began = self.saved_at = time.monotonic()
        self.seconds_before = 0.0  # of the attempts that this one goes on from

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, what an interrupted attempt did after its last save left out."""
        return round(self.seconds_before + time.monotonic() - self.began, 2)

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest saved state of the job as a local folder, if there is one."""
        query = select(Checkpoint).where(Checkpoint.job_id == self.claim.id, Checkpoint.kind == "resume")
        with self.claim.core.transaction() as session:
            row = session.scalar(query.order_by(Checkpoint.step.desc()).limit(1))
        if row is None:
            yield None
            return
        self.seconds_before = float(row.metrics["seconds"])
        self.claim.event("training.resumed", f"going on from step {row.step}", {"step": row.step, "epoch": row.epoch})
        with self.claim.core.store.local_folder(row.storage_key) as folder:
            yield folder

    def on_step(self, report: StepReport) -> None:
        self.claim.progress(
            "training",
            report.step,
            report.total_steps,
            epoch=report.epoch,
            epochs=report.epochs,
            loss=round(report.loss, 4),
            images_per_second=round(report.images_per_s, 1),
        )
        try:
            self.claim.check()
        except (Paused, HandedBack):
            self._save(report)
            raise
        if time.monotonic() - self.saved_at >= self.every_seconds and report.step < report.total_steps:
            self._save(report)

    def on_epoch(self, report: EpochReport) -> None:
        best = "" if report.best_val_top1 is None else f", best {report.best_val_top1:.3f} at {report.best_epoch}"
        shown = "" if report.val_top1 is None else f": val top-1 {report.val_top1:.3f}{best}"
        data = {"epoch": report.epoch, "step": report.step, "val_top1": report.val_top1}
        self.claim.event("training.epoch", f"epoch {report.epoch} of {report.epochs}{shown}", data)

    def _save(self, report: StepReport) -> None:
        key = f"training/{self.claim.id}-{self.claim.attempt}-{report.step}"
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            report.snapshot(Path(folder))
            self.claim.core.store.put_folder(key, Path(folder))
        with self.claim.transaction() as session:
            ledger.drop_saved_states(session, self.claim.id)
            self.claim.advanced(session)
            session.add(
                Checkpoint(
                    id=new_id("ckpt"),
                    job_id=self.claim.id,
                    kind="resume",
                    step=report.step,
                    epoch=report.epoch,
                    storage_key=key,
                    metrics={"loss": report.loss, "seconds": self.seconds},
                )
            )
        self.saved_at = time.monotonic()


def _finish(
    session: Session,
    claim: Claim,
    request: FineTuningRequest,
    method: Method,
    sources: _Sources,
    result: TrainResult,
    key: str,
    seconds: float,
) -> dict[str, Any]:
    details = {
        "val_top1": result.val_top1,
        "best_epoch": result.best_epoch,
        "steps": result.steps,
        "train_seconds": seconds if method.trains else 0.0,
        "images_per_second": round(result.images_per_s, 1),
        "trainable_parameters": result.trainable_parameters,
        "train_images": len(sources.train),
        "val_images": len(sources.val),
        "captions": sources.recipe,
        "captions_used": sum(len(texts) for texts in sources.captions.values()),
        "captions_left_out": dict(sources.left_out),
        "fewer_shots": sources.fewer,
    }
    classifier = Classifier(
        id=new_id("clf"),
        owner=claim.owner,
        job_id=claim.id,
        dataset_id=request.dataset_id,
        model=request.model,
        method=method.name,
        hyperparameters=request.method.hyperparameters,
        shots=request.shots,
        shot_seed=request.shot_seed,
        seed=request.seed,
        protocol=request.validation if method.trains else "zero_shot",
        caption_job_id=request.caption_job_id,
        captioner=sources.captioner,
        suffix=request.suffix,
        data_fingerprint=str(sources.dataset.fingerprint),
        storage_key=key,
        details=details,
    )
    session.add(classifier)
    session.add(
        Checkpoint(
            id=new_id("ckpt"),
            job_id=claim.id,
            kind="best",
            step=result.steps,
            epoch=result.best_epoch,
            storage_key=key,
            metrics={"val_top1": result.val_top1},
        )
    )
    evaluation = ledger.create(
        session,
        id=new_id("eval"),
        kind="evaluate",
        owner=claim.owner,
        request={"classifier_id": classifier.id, "split": "test"},
        dataset_id=request.dataset_id,
    )
    return {"classifier_id": classifier.id, "evaluation_id": evaluation.id, **details}
