"""The fine-tuning job: gather the run's data, train the model (loop.py) or fit a head on its features (frozen.py), save
the classifier, and queue its evaluation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from services.trainer import frozen, methods
from services.trainer.features import Features
from services.trainer.methods.base import FineTune, Frozen, Method
from services.trainer.routes import soup_request
from services.trainer.runs import devices, soup
from services.trainer.runs.gathering import Sources, gather
from services.trainer.runs.notices import warn
from services.trainer.runs.recording import Record, add_checkpoint, save_classifier
from services.trainer.runs.saver import Saver
from services.trainer.settings import TrainerSettings
from services.trainer.training.data import TrainData
from services.trainer.training.loop import train
from services.trainer.training.reports import Diverged, TrainResult
from shared.clip.loading import LoadedClip
from shared.clip.pixels import Pixels, load_pixels
from shared.clip.warm import Warm, place, warm_model
from shared.db.models import Image
from shared.errors import InvalidInput
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.fine_tuning import FineTuningRequest

STATE_OF_NO_USE = ("state_of_another_run", "state_unreadable")  # the saved one; training can begin without it


def fine_tune(claim: Claim) -> Finish:
    request = FineTuningRequest.model_validate(claim.request)
    settings = TrainerSettings()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if request.method.type == soup_request.METHOD:
        return soup.cook(claim, request, settings)
    method = methods.build(request.method.type, request.method.hyperparameters)
    with claim.core.db.snapshot() as session:
        sources = gather(session, request, method)
    warn(claim, request, method, sources)
    claim.progress("loading the model", 0, 1)
    model = warm_model(request.model, claim.core.settings, place(settings.device))
    micro_batch = method.hyperparameters.micro_batch if isinstance(method, FineTune) else None
    saver = Saver(claim, settings.checkpoint_seconds, micro_batch)
    features = _features(claim, request, method, sources, model)
    if isinstance(method, FineTune):
        try:
            result = _train(claim, request, method, sources, model, features, saver, settings)
        except Diverged as error:
            _keep(claim, request, method, sources, model.clip, error.last_good)
            raise
    else:
        result = frozen.fit(model.clip, method, features, request.seed)
    seconds = saver.seconds
    claim.check()
    record = Record(
        method=method.name,
        hyperparameters=method.hyperparameters.model_dump(mode="json"),
        protocol="zero_shot" if method.kind == "zero_shot" else request.validation,
        captioner=sources.captioner,
        fingerprint=str(sources.dataset.fingerprint),
        result=result,
        details={
            "train_seconds": 0.0 if method.kind == "zero_shot" else seconds,
            "device": devices.device_name(settings),
            "train_images": len(sources.train),
            "val_images": len(sources.val),
            "fewer_shots": sources.fewer,
            "captions": sources.recipe,
            "captions_used": sum(len(texts) for texts in sources.captions.values()),
            "captions_left_out": dict(sources.left_out),
            "caption_seconds": sources.caption_seconds,
        },
        key=save_classifier(claim, request, method, sources, model.clip, result),
        last_key=_save_last(claim, request, method, sources, model.clip, result),
    )
    return lambda session: record.write(session, claim, request)


def _features(claim: Claim, request: FineTuningRequest, method: Method, sources: Sources, model: Warm) -> Features:
    """What the method sees of the frozen model: every embedding is computed once and kept."""
    store, embedder = claim.core.store, model.embedder
    claim.progress("embedding texts", 0, 1)
    features = Features(
        class_names=sources.display_names,
        prototypes=embedder.class_means(sources.prototype_texts(method)),
        logit_scale=float(model.clip.model.logit_scale.detach().exp()),
        shots=request.shots,
        train_labels=torch.tensor(sources.labels(sources.train), dtype=torch.int64),
        val_labels=torch.tensor(sources.labels(sources.val), dtype=torch.int64),
    )
    wanted = isinstance(method, Frozen) or (isinstance(method, FineTune) and method.needs_features)
    if not wanted:
        return features
    unprojected = isinstance(method, Frozen) and method.needs_unprojected
    progress = _ImageProgress(claim, "embedding images", len(sources.train) + len(sources.val))
    embed = embedder.unprojected if unprojected else embedder.images
    train, val = (embed(store, split, progress.of(split)) for split in (sources.train, sources.val))
    if unprojected:
        return replace(features, train_unprojected=train, val_unprojected=val)
    return replace(features, train=train, val=val)


class _ImageProgress:
    """Of images that are gone through split by split: the callbacks that embedders and loaders take."""

    def __init__(self, claim: Claim, stage: str, total: int) -> None:
        self.claim, self.stage, self.total = claim, stage, total
        self.before = 0

    def of(self, split: list[Image]) -> Callable[[int], None]:
        before = self.before
        self.before += len(split)

        def on_chunk(done: int) -> None:
            self.claim.check()
            self.claim.progress(self.stage, before + done, self.total)

        return on_chunk


def _train(
    claim: Claim,
    request: FineTuningRequest,
    method: FineTune,
    sources: Sources,
    model: Warm,
    features: Features,
    saver: Saver,
    settings: TrainerSettings,
) -> TrainResult:
    progress = _ImageProgress(claim, "loading images", len(sources.train) + len(sources.val))

    def pixels(split: list[Image]) -> torch.Tensor | Pixels:
        return load_pixels(model.cache, claim.core.store, split, model.clip, progress.of(split))

    data = TrainData(
        images=pixels(sources.train),
        labels=features.train_labels,
        captions=sources.captions_of(sources.train),
        class_names=sources.display_names,
        val_images=pixels(sources.val),
        val_labels=features.val_labels,
    )

    def go_on(resume: Path | None) -> TrainResult:
        return train(
            model.clip,
            method,
            data,
            features=features,
            seed=request.seed,
            resume=resume,
            on_step=saver.on_step,
            on_epoch=saver.on_epoch,
            device=settings.device,
            keep_last=request.checkpoints == "best_and_last",
            processes=devices.processes(settings),
        )

    with saver.newest() as resume:
        try:
            return go_on(resume)
        except InvalidInput as error:
            if error.code not in STATE_OF_NO_USE:
                raise
            saver.begin_anew(error)
    return go_on(None)


def _save_last(
    claim: Claim, request: FineTuningRequest, method: Method, sources: Sources, clip: LoadedClip, result: TrainResult
) -> str | None:
    if result.last_state is None or result.last_head is None:
        return None
    last = replace(
        result,
        model_state=result.last_state,
        head=result.last_head,
        val_top1=result.val_history[-1] if result.val_history else None,
        best_epoch=len(result.val_history) or result.best_epoch,
    )
    return save_classifier(claim, request, method, sources, clip, last, "last")


def _keep(
    claim: Claim,
    request: FineTuningRequest,
    method: Method,
    sources: Sources,
    clip: LoadedClip,
    last_good: TrainResult | None,
) -> None:
    """What a run that diverged had reached: a checkpoint of the failed job, and no classifier of the leaderboard."""
    if last_good is None:
        return
    key = save_classifier(claim, request, method, sources, clip, last_good)
    with claim.transaction() as session:
        metrics = {"val_top1": last_good.val_top1}
        add_checkpoint(session, claim, "best", last_good.steps, last_good.best_epoch, key, metrics)
