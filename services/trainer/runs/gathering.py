"""The rows that decide a run's data: images, captions, classes."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Text, any_, cast, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from services.trainer.methods.base import Method
from services.trainer.routes.submission import no_val_split
from shared.datasets.lookup import draw_shots, split_images
from shared.db.models import Caption, CaptionJobItem, Dataset, Image, Job
from shared.errors import InvalidInput
from shared.schemas.fine_tuning import FineTuningRequest


@dataclass
class Sources:
    """Read once, of one moment: captions may be edited meanwhile, and the edits are part of the setting."""

    dataset: Dataset
    train: list[Image] = field(default_factory=list)
    val: list[Image] = field(default_factory=list)
    fewer: dict[str, int] = field(default_factory=dict)  # training images of the classes with fewer than the shots
    fewer_val: dict[str, int] = field(default_factory=dict)  # the same of val images, where those are few-shot
    captions: dict[str, list[str]] = field(default_factory=dict)  # by image id
    left_out: Counter[str] = field(default_factory=Counter)  # captions by the flag (or "by_hand") that excluded them
    caption_seconds: float = 0.0  # of the caption job's running time, the share of the captions used
    captioner: str | None = None
    measured_for: str | None = None  # the CLIP whose tokenizer measured the captions
    recipe: dict[str, Any] | None = None  # how the captions were asked for: it tells settings apart on the leaderboard

    @property
    def class_names(self) -> list[str]:
        return [c["name"] for c in self.dataset.classes or ()]

    @property
    def display_names(self) -> list[str]:
        return [c["display_name"] for c in self.dataset.classes or ()]

    def labels(self, images: Sequence[Image]) -> list[int]:
        index = {name: i for i, name in enumerate(self.class_names)}
        return [index[image.class_name] for image in images]

    def captions_of(self, images: Sequence[Image]) -> list[list[str]]:
        return [self.captions.get(image.id, []) for image in images]

    def prototype_texts(self, method: Method) -> list[list[str]]:
        """What each class's prototype is made of, in label order."""
        own: dict[str, list[str]] = {name: [] for name in self.class_names}
        for image in self.train:
            own[image.class_name] += self.captions.get(image.id, ())
        return [
            method.prototype_texts(display, own[name])
            for name, display in zip(self.class_names, self.display_names, strict=True)
        ]

    def bare_classes(self) -> list[str]:
        """Classes none of whose training images has a caption."""
        told = {image.class_name for image in self.train if self.captions.get(image.id)}
        return [name for name in self.class_names if name not in told]


def gather(session: Session, request: FineTuningRequest, method: Method) -> Sources:
    """Raises InvalidInput where the data do not allow what was asked."""
    found = Sources(session.get_one(Dataset, request.dataset_id))
    if method.kind == "zero_shot" and not method.needs_captions:
        return found
    found.train, found.fewer = draw_shots(
        split_images(session, request.dataset_id, "train"), request.shots, request.shot_seed
    )
    found.val, found.fewer_val = val_images(session, request)
    if method.needs_captions and request.caption_job_id is not None:
        _gather_captions(session, request, method, found)
    if method.needs_captions and not found.captions:
        raise InvalidInput(
            f"Method `{method.name}` reads captions, and none of the {len(found.train)} training images has one that "
            "is used. Caption the data set first, leave fewer out ('exclude_flags'), or choose a method that needs "
            "none.",
            code="captions_missing",
            param="caption_job_id",
        )
    return found


def val_images(session: Session, request: FineTuningRequest) -> tuple[list[Image], dict[str, int]]:
    """By the request's validation protocol, and the classes that have fewer than the shots it asks for. Raises
    InvalidInput where the data have none."""
    if request.validation == "none":
        return [], {}
    shots = request.shots if request.validation == "few_shot" else None
    found, fewer = draw_shots(split_images(session, request.dataset_id, "val"), shots, request.shot_seed)
    if not found:
        raise no_val_split(request.validation)
    return found, fewer


def _gather_captions(session: Session, request: FineTuningRequest, method: Method, found: Sources) -> None:
    """The captions of the training images that the method uses; what the policy leaves out is counted under its first
    reason."""
    job = session.get_one(Job, request.caption_job_id)
    items = select(CaptionJobItem.caption_id).where(CaptionJobItem.job_id == job.id)
    wanted = [image.id for image in found.train]
    query = (
        select(Caption.image_id, Caption.text, Caption.flags + CaptionJobItem.flags, Caption.excluded)
        .join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        .where(CaptionJobItem.job_id == job.id, Caption.image_id == any_(cast(wanted, ARRAY(Text))))
    )
    usable: dict[str, list[str]] = {}  # by image id
    for image_id, text, flags, excluded in session.execute(query.order_by(Caption.image_id, Caption.key)):
        reason = "by_hand" if excluded else next((flag for flag in request.exclude_flags if flag in flags), None)
        if reason is None:
            usable.setdefault(image_id, []).append(text)
        else:
            found.left_out[reason] += 1
    found.captions = {image_id: method.captions_of(texts) for image_id, texts in usable.items()}
    result = job.result or {}
    # A caption's own milliseconds are those of its whole batch and of its wait: summed, they count the time many times.
    if job.started_at is not None and job.finished_at is not None and result.get("captions"):
        share = sum(map(len, found.captions.values())) / result["captions"]
        found.caption_seconds = round((job.finished_at - job.started_at).total_seconds() * share, 3)
    captioner = result["captioner"]
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
