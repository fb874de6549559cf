"""What a finished run leaves: its classifier in the store and in the ledger, its checkpoints, and the job that scores
it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.orm import Session

from services.trainer.routes.submission import BASELINES
from services.trainer.runs.checkpoints import Maker, write_classifier
from services.trainer.runs.gathering import Sources
from services.trainer.training.reports import TrainResult
from shared.clip.loading import LoadedClip
from shared.db.models import Checkpoint, Classifier, Job
from shared.ids import new_id
from shared.jobs import ledger
from shared.jobs.claim import Claim
from shared.schemas.evaluations import EvaluationRequest
from shared.schemas.fine_tuning import FineTuningRequest
from shared.settings_key import setting_of


def save_classifier(
    claim: Claim,
    request: FineTuningRequest,
    method: Maker,
    sources: Sources,
    clip: LoadedClip,
    result: TrainResult,
    kind: Literal["best", "last"] = "best",
) -> str:
    """Writes the folder into the store; returns its key, of this attempt alone."""
    claim.progress(f"saving the {kind} weights", 0, 1)
    key = f"classifiers/{claim.id}/{claim.attempt}" + ("" if kind == "best" else f"-{kind}")
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
    return key


@dataclass(frozen=True)
class Record:
    """protocol: what chose the result: the request's validation, or "zero_shot" where nothing was chosen. details: what
    else the classifier shows of itself, `captions` (how they were asked for) among it. last_key: of the last epoch's
    classifier, where it is kept too."""

    method: str
    hyperparameters: dict[str, Any]
    protocol: str
    captioner: str | None
    fingerprint: str
    result: TrainResult
    details: dict[str, Any]
    key: str
    last_key: str | None = None

    def write(self, session: Session, claim: Claim, request: FineTuningRequest) -> dict[str, Any]:
        """In the transaction that ends the job. Returns the job's result."""
        group_id = session.get_one(Job, claim.id).group_id
        details = {
            **self.details,
            "val_top1": self.result.val_top1,
            "best_epoch": self.result.best_epoch,
            "steps": self.result.steps,
            "images_per_second": round(self.result.images_per_s, 1),
            "trainable_parameters": self.result.trainable_parameters,
            "peak_memory_bytes": self.result.peak_memory_bytes,
            "chosen": self.result.chosen,
        }
        classifier = Classifier(
            id=new_id("clf"),
            owner=claim.owner,
            job_id=claim.id,
            group_id=group_id,
            dataset_id=request.dataset_id,
            model=request.model,
            method=self.method,
            hyperparameters=self.hyperparameters,
            shots=request.shots,
            shot_seed=request.shot_seed,
            seed=request.seed,
            protocol=self.protocol,
            caption_job_id=request.caption_job_id,
            captioner=self.captioner,
            suffix=request.suffix,
            setting=setting_of(
                protocol=self.protocol,
                method=self.method,
                model=request.model,
                captioner=self.captioner,
                shots=request.shots,
                hyperparameters=self.hyperparameters,
                suffix=request.suffix,
                captions=details.get("captions"),
            ),
            tags=list(dict.fromkeys(request.tags)),
            pinned=self.method in BASELINES,
            data_fingerprint=self.fingerprint,
            storage_key=self.key,
            details=details,
        )
        session.add(classifier)
        self._add_checkpoints(session, claim)
        evaluation = ledger.create(
            session,
            id=new_id("eval"),
            kind="evaluate",
            owner=claim.owner,
            request=EvaluationRequest(classifier_id=classifier.id).model_dump(),
            dataset_id=request.dataset_id,
        )
        evaluation.group_id = group_id
        return {"classifier_id": classifier.id, "evaluation_id": evaluation.id, **details}

    def _add_checkpoints(self, session: Session, claim: Claim) -> None:
        epochs = len(self.result.val_history) or self.result.best_epoch
        metrics = {"val_top1": self.result.val_top1}
        add_checkpoint(session, claim, "best", self.result.steps, self.result.best_epoch, self.key, metrics)
        if self.last_key is not None:
            last = self.result.val_history[-1] if self.result.val_history else None
            add_checkpoint(session, claim, "last", self.result.steps, epochs, self.last_key, {"val_top1": last})


def add_checkpoint(
    session: Session, claim: Claim, kind: str, step: int, epoch: int, key: str, metrics: dict[str, float | None]
) -> None:
    """`key`: of a classifier's folder in the store."""
    session.add(
        Checkpoint(
            id=new_id("ckpt"), job_id=claim.id, kind=kind, step=step, epoch=epoch, storage_key=key, metrics=metrics
        )
    )
