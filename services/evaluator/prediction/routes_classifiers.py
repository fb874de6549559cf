"""REST: what classifiers are for: predictions, downloads; and classifiers made elsewhere."""

import hashlib
import json
import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from services.evaluator.prediction import downloading, importing, serving
from services.evaluator.prediction.pictures import read_pictures
from services.evaluator.prediction.serving import Predictor
from services.evaluator.scoring.classes import check_classes
from services.evaluator.settings import EvaluatorSettings
from shared.classifier.card import ClassifierCard
from shared.core import Core
from shared.datasets.archive import sniff
from shared.datasets.lookup import display_names, usable_dataset
from shared.db.models import Classifier
from shared.errors import NotFound
from shared.ids import new_id
from shared.jobs.routes import SubmissionDep
from shared.leaderboard_version import bump
from shared.schemas import evaluations as schema
from shared.schemas import fine_tuning
from shared.settings_key import setting_of
from shared.store.references import keep
from shared.web.api import CoreDep
from shared.web.auth import Principal, Reader

router = APIRouter(prefix="/v1/classifiers", tags=["evaluator"])

_PICTURES = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["images"],
            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    }
}


def evaluator_settings(request: Request) -> EvaluatorSettings:
    """Read once for each application."""
    state = request.app.state
    if not hasattr(state, "evaluator_settings"):
        state.evaluator_settings = EvaluatorSettings()
    settings: EvaluatorSettings = state.evaluator_settings
    return settings


SettingsDep = Annotated[EvaluatorSettings, Depends(evaluator_settings)]


async def predictor_of(request: Request, settings: SettingsDep) -> Predictor:
    """One for each application, made on the event loop's thread, so that there is one."""
    state = request.app.state
    if not hasattr(state, "predictor"):
        state.predictor = Predictor(
            models=settings.predict_models,
            queue=settings.predict_queue,
            batch=settings.predict_batch,
            body_bytes=settings.predict_waiting_bytes,
        )
    predictor: Predictor = state.predictor
    return predictor


@router.post(
    "/{id}/predict",
    response_model=schema.Predictions,
    summary="Classify images",
    openapi_extra={"requestBody": {"required": True, "content": _PICTURES}},
)
async def predict(
    id: str,
    request: Request,
    core: CoreDep,
    who: Reader,
    settings: SettingsDep,
    predictor: Annotated[Predictor, Depends(predictor_of)],
    top_k: Annotated[int, Query(ge=1, le=1000, description="classes told of each image")] = 5,
) -> Any:
    """Form data with one or more files `images`. The first prediction of a classifier loads it, and waits for that.
    Where too many images wait the answer is 429: send them again later."""
    key = await run_in_threadpool(_storage_key, core, who, id)  # and only then is the body read
    declared = request.headers.get("content-length", "")
    with predictor.holding(int(declared) if declared.isdigit() else settings.predict_bytes):
        names, images = await read_pictures(request, settings.predict_files, settings.predict_bytes)
        card, rows = await predictor.predict(key, partial(serving.load, core, settings, key), names, images)
    data = [_prediction(card, name, row, top_k) for name, row in zip(names, rows, strict=True)]
    return schema.Predictions(classifier_id=id, data=data)


def _prediction(card: ClassifierCard, file: str, row: list[float], top_k: int) -> schema.Prediction:
    order = sorted(range(len(row)), key=lambda c: -row[c])[:top_k]
    classes = [
        {"class_name": card.class_names[c], "display_name": card.display_names[c], "probability": row[c]} for c in order
    ]
    return schema.Prediction(
        file=file, class_name=card.class_names[order[0]], probability=row[order[0]], classes=classes
    )


def _storage_key(core: Core, who: Principal, id: str) -> str:
    with core.db.snapshot() as session:
        row = session.scalar(select(Classifier).where(Classifier.id == id, who.sees(Classifier.owner)))
        if row is None:
            raise NotFound(f"there is no classifier '{id}' among yours; GET /v1/classifiers lists them", param="id")
        return row.storage_key


@router.get(
    "/{id}/download",
    response_class=FileResponse,
    summary="A zip of a folder that plain open_clip loads, with the head and the class names",
    responses={200: {"content": {"application/zip": {}}}},
)
def download(id: str, core: CoreDep, who: Reader, settings: SettingsDep) -> FileResponse:
    key = _storage_key(core, who, id)
    with ExitStack() as made:
        folder = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="captune-")))
        scratch, file = folder / "files", folder / "classifier.zip"
        scratch.mkdir()
        with file.open("wb") as out:
            downloading.write_zip(core, settings, key, scratch, out)
        shutil.rmtree(scratch)
        done = BackgroundTask(made.pop_all().close)
    return FileResponse(file, media_type="application/zip", filename=f"{id}.zip", background=done)


@router.post(
    "/import", status_code=201, response_model=fine_tuning.Classifier, summary="Bring in a classifier made elsewhere"
)
def import_classifier(
    submission: SubmissionDep,
    settings: SettingsDep,
    file: Annotated[UploadFile, File(description="a zip or tar as `download` gives it; weights are safetensors")],
    dataset_id: Annotated[str, Form(max_length=100, description="whose classes it tells apart")],
    name: Annotated[str, Form(min_length=1, max_length=64, description="its suffix: tells its row apart")] = "imported",
) -> Any:
    """Checked as a whole before it is taken: every file's SHA-256, shapes, the class list. `POST /v1/evaluations` then
    scores it."""
    core, who = submission.core, submission.who
    sniff(file.file)
    with core.transaction() as session:
        names = list(display_names(usable_dataset(session, who, dataset_id)))
    with tempfile.TemporaryDirectory(prefix="captune-") as temporary:
        folder, archive = Path(temporary) / "files", Path(temporary) / "archive"
        folder.mkdir()
        with archive.open("wb") as out:
            shutil.copyfileobj(file.file, out, 1 << 20)
        with archive.open("rb") as packed:
            digest = hashlib.file_digest(packed, "sha256").hexdigest()
        importing.unpack(archive, folder, settings.import_bytes)
        archive.unlink()
        card = serving.check(core, settings, folder)
        check_classes(card.class_names, names, "Name the data set that it was made for")
        id = new_id("clf")
        key = f"classifiers/{id}/0"
        core.store.put_folder(key, folder)

        def create(session: Session) -> str:
            dataset = usable_dataset(session, who, dataset_id, lock=True)
            session.add(_row(id, dataset.owner, dataset_id, name, card, key))
            bump(session, dataset_id)
            session.flush()
            keep(session, core.store, [key])
            return id

        asked = json.dumps({"dataset_id": dataset_id, "name": name, "sha256": digest})
        return submission.accept_as(
            Classifier, "/v1/classifiers", asked, create, lambda _, row: fine_tuning.Classifier.model_validate(row), key
        )


def _row(id: str, owner: str, dataset_id: str, name: str, card: ClassifierCard, key: str) -> Classifier:
    captioner = card.provenance.get("captioner")
    shown = captioner if isinstance(captioner, str) else None
    return Classifier(
        id=id,
        owner=owner,
        dataset_id=dataset_id,
        model=card.base_model,
        method=card.method,
        hyperparameters=card.hyperparameters,
        shots=card.shots,
        shot_seed=card.seeds.get("shots", 0),
        seed=card.seeds.get("training", 0),
        protocol=card.validation,
        captioner=shown,
        suffix=name,
        setting=setting_of(
            protocol=card.validation,
            method=card.method,
            model=card.base_model,
            captioner=shown,
            shots=card.shots,
            hyperparameters=card.hyperparameters,
            suffix=name,
            captions=None,
        ),
        tags=["imported"],
        data_fingerprint=card.data_fingerprint,
        storage_key=key,
        details={
            "val_top1": card.val_top1,
            "best_epoch": card.best_epoch,
            "versions": card.versions,
            "captions": None,
        },
    )
