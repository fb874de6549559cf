"""Greedy model soup: "Model soups: averaging weights of multiple fine-tuned models", arXiv 2203.05482, recipe 1.

The runs of a group are gone through by their val top-1, best first. Each is added to the average of weights and heads,
and stays in it where the average then does no worse on the validation images. Costs one pass over those per run and
nothing at inference. Deviations: none in the recipe; heads of class prototypes are averaged like linear ones.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from sqlalchemy import select
from torch import Tensor

from services.trainer.methods.base import MethodHyperparameters
from services.trainer.routes import soup_request
from services.trainer.runs import devices
from services.trainer.runs.gathering import Sources, val_images
from services.trainer.runs.recording import Record, save_classifier
from services.trainer.settings import TrainerSettings
from services.trainer.training.reports import TrainResult
from shared.classifier.folder import load_classifier
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip, encode_image
from shared.clip.pixels import Pixels, load_pixels
from shared.clip.warm import Warm, place, warm_model
from shared.db.models import Classifier, Dataset
from shared.errors import NotFound
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.fine_tuning import FineTuningRequest

State = dict[str, Tensor]


class SoupHyperparameters(MethodHyperparameters):
    """`method`: whose fine-tunes alone are members; None: all. `classifier_ids`: the candidates, best first."""

    group_id: str
    method: str | None
    classifier_ids: list[str]


@dataclass(frozen=True)
class Soup:
    """What the card says of it."""

    hyperparameters: SoupHyperparameters
    name: ClassVar[str] = soup_request.METHOD
    kind: ClassVar[Literal["fine_tune"]] = "fine_tune"


@dataclass(frozen=True)
class Ingredient:
    """A fine-tune: float32, on the CPU."""

    id: str
    state: State
    head: Head


def cook(claim: Claim, request: FineTuningRequest, settings: TrainerSettings) -> Finish:
    chosen = SoupHyperparameters.model_validate(request.method.hyperparameters)
    with claim.core.transaction() as session:
        sources = Sources(session.get_one(Dataset, request.dataset_id), val=val_images(session, request)[0])
        found = {
            row.id: row for row in session.scalars(select(Classifier).where(Classifier.id.in_(chosen.classifier_ids)))
        }
    if gone := [id for id in chosen.classifier_ids if id not in found]:
        raise NotFound(f"the members {', '.join(gone)} were deleted; ask for the soup again", param="classifier_ids")
    rows = [found[id] for id in chosen.classifier_ids]
    sources.captioner = _common([row.captioner for row in rows])
    sources.recipe = _common([row.details.get("captions") for row in rows])
    began = time.monotonic()
    claim.progress("loading the model", 0, 1)
    model = warm_model(request.model, claim.core.settings, place(settings.device))
    val = _validation(claim, sources, model)
    with claim.core.store.local_folder(rows[0].storage_key) as folder:
        clip = load_classifier(folder, str(place(settings.device))).clip  # a copy of our own to put averages into

    def read(row: Classifier) -> Ingredient:
        with claim.core.store.local_folder(row.storage_key) as folder:
            loaded = load_classifier(folder)
        return Ingredient(row.id, loaded.clip.model.state_dict(), loaded.head)

    def on_member(done: int) -> None:
        claim.check()
        claim.progress("averaging", done, len(rows))

    state, head, members, tried = greedy(
        (read(row) for row in rows), lambda state, head: _val_top1(clip, state, head, *val), on_member
    )
    result = TrainResult(
        model_state=state,
        head=head,
        best_epoch=0,
        val_top1=max(tried),
        val_history=[],
        steps=0,
        seconds=time.monotonic() - began,
        images_per_s=0.0,
        trainable_parameters=0,
        chosen={"members": members, "candidates": chosen.classifier_ids, "val_top1_with_each": tried},
    )
    settled = {"group_id": chosen.group_id, "method": chosen.method}
    used = [found[id].details for id in members]
    record = Record(
        method=soup_request.METHOD,
        hyperparameters=settled,
        protocol=request.validation,
        captioner=sources.captioner,
        fingerprint=str(sources.dataset.fingerprint),
        result=result,
        details={
            # What it took to have it: every candidate had to be trained.
            "train_seconds": round(sum(row.details["train_seconds"] for row in rows) + result.seconds, 2),
            "device": devices.device_name(settings),
            "train_images": max(int(each["train_images"]) for each in used),
            "val_images": len(sources.val),
            "captions": sources.recipe,
            "caption_seconds": max(float(each.get("caption_seconds") or 0.0) for each in used),
            "members": members,
        },
        key=save_classifier(claim, request, Soup(chosen), sources, model.clip, result),
    )
    return lambda session: record.write(session, claim, request)


def greedy(
    candidates: Iterable[Ingredient], score: Callable[[State, Head], float], on_member: Callable[[int], None]
) -> tuple[State, Head, list[str], list[float]]:
    """The average of the members' weights and heads, who they are, and what `score` said with each candidate in turn.
    Candidates come best first; one stays if the average with it scores no less than without. `on_member(done)` is
    called before each and may raise. At least one candidate is needed, and all have the same shapes."""
    state: State = {}
    head: Head | None = None
    members: list[str] = []
    tried: list[float] = []
    best = float("-inf")
    for done, each in enumerate(candidates):
        on_member(done)
        share = 1 / (len(members) + 1)
        with_it = {name: _towards(state.get(name, value), value, share) for name, value in each.state.items()}
        if head is None:
            head_with_it = each.head
        else:
            weight, bias = _towards(head.weight, each.head.weight, share), _towards(head.bias, each.head.bias, share)
            head_with_it = Head(weight, bias)
        tried.append(score(with_it, head_with_it))
        if tried[-1] >= best:
            state, head, best = with_it, head_with_it, tried[-1]
            members.append(each.id)
    assert head is not None
    return state, head, members, tried


def _towards(mean: Tensor, value: Tensor, share: float) -> Tensor:
    """A running mean's next value. Counts (of BatchNorm's batches) and positions are no weights."""
    return torch.lerp(mean, value, share) if mean.is_floating_point() else mean


def _validation(claim: Claim, sources: Sources, model: Warm) -> tuple[Tensor | Pixels, Tensor]:
    def on_chunk(done: int) -> None:
        claim.check()
        claim.progress("loading images", done, len(sources.val))

    images = load_pixels(model.cache, claim.core.store, sources.val, model.clip, on_chunk)
    return images, torch.tensor(sources.labels(sources.val), dtype=torch.int64)


def _val_top1(clip: LoadedClip, state: State, head: Head, images: Tensor | Pixels, labels: Tensor) -> float:
    clip.model.load_state_dict(state)
    parts = [encode_image(clip, images[rows]) for rows in torch.split(torch.arange(len(labels)), 256)]
    return head.top1(torch.cat(parts), labels)


def _common(values: Sequence[Any]) -> Any:
    """The value, where all are the same; else None."""
    return values[0] if all(value == values[0] for value in values) else None
