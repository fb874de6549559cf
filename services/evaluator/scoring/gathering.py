"""The rows that decide an evaluation: what is scored, and on which images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.evaluator.passes import forgetting, retrieval
from services.evaluator.passes.base import sample
from services.evaluator.scoring import bare
from shared.datasets.lookup import display_names, split_images
from shared.db.models import Caption, CaptionJobItem, Classifier, Dataset, Image
from shared.errors import CaptuneError, InvalidInput, NotFound, Unavailable
from shared.schemas.captions import EXCLUDED_BY_DEFAULT
from shared.schemas.common import Split
from shared.schemas.evaluations import EvaluationRequest


@dataclass
class Sources:
    """Read once, of one moment. `classifier`: None for a bare model that has none yet on this data set."""

    classifier: Classifier | None
    dataset: Dataset
    images: Sequence[Image]
    val: Sequence[Image]  # to fit the temperature on; none where that is the split scored
    held_aside: Dataset | None = None
    held_aside_images: list[Image] = field(default_factory=list)
    captioned: list[Image] = field(default_factory=list)  # images with captions, for retrieval
    captions: list[tuple[int, str]] = field(default_factory=list)  # place in `captioned`, text

    @property
    def class_names(self) -> list[str]:
        return list(display_names(self.dataset))

    @property
    def display_names(self) -> list[str]:
        return list(display_names(self.dataset).values())

    def labels(self, images: Sequence[Image]) -> list[int]:
        return labels_of(self.dataset, images)


def gather(session: Session, request: EvaluationRequest) -> Sources:
    """Raises NotFound where something was deleted since the job was accepted, InvalidInput for a split without images
    or captions."""
    row = None
    if request.classifier_id is not None:
        row = session.scalar(select(Classifier).where(Classifier.id == request.classifier_id))
        if row is None:
            raise deleted(request, request.classifier_id)
    dataset_id = request.dataset_id or (row.dataset_id if row is not None else "")
    dataset = _dataset(session, dataset_id, "dataset_id")
    if row is None and request.model is not None:
        row = bare.find(session, request.model, dataset)
    images = _images(session, dataset.id, request.split, "split")
    found = Sources(row, dataset, images, [] if request.split == "val" else split_images(session, dataset.id, "val"))
    if request.held_aside_dataset_id is not None:
        found.held_aside = _dataset(session, request.held_aside_dataset_id, "held_aside_dataset_id")
        aside = _images(session, found.held_aside.id, "test", "held_aside_dataset_id")
        found.held_aside_images = [aside[i] for i in sample(len(aside), forgetting.LIMIT)]
    if request.caption_job_id is not None:
        _gather_captions(session, request.caption_job_id, found)
    return found


def labels_of(dataset: Dataset, images: Sequence[Image]) -> list[int]:
    place = {name: i for i, name in enumerate(display_names(dataset))}
    return [place[image.class_name] for image in images]


def deleted(request: EvaluationRequest, classifier_id: str) -> CaptuneError:
    if request.classifier_id is None:
        return Unavailable(
            f"the zero-shot classifier {classifier_id} of {request.model} was deleted while it was scored; trying "
            "again makes it anew"
        )
    return NotFound(
        f"the classifier {classifier_id} was deleted before it was scored; GET /v1/classifiers lists what there is",
        code="classifier_deleted",
        param="classifier_id",
    )


def _dataset(session: Session, dataset_id: str, param: str) -> Dataset:
    row = session.get(Dataset, dataset_id)
    if row is None:
        raise NotFound(
            f"the data set {dataset_id} was deleted; score on another one, naming it as '{param}'",
            code="dataset_deleted",
            param=param,
        )
    return row


def _images(session: Session, dataset_id: str, split: Split, param: str) -> Sequence[Image]:
    images = split_images(session, dataset_id, split)
    if not images:
        raise InvalidInput(
            f"the split '{split}' of {dataset_id} has no images; choose another one", code="empty_split", param=param
        )
    return images


def _gather_captions(session: Session, job_id: str, found: Sources) -> None:
    flags = Caption.flags + CaptionJobItem.flags
    query = (
        select(Caption.image_id, Caption.text)
        .join(CaptionJobItem, CaptionJobItem.caption_id == Caption.id)
        .where(CaptionJobItem.job_id == job_id, ~Caption.excluded, ~flags.overlap(list(EXCLUDED_BY_DEFAULT)))
        .order_by(Caption.image_id, Caption.key)
    )
    texts: dict[str, list[str]] = {}
    for image_id, text in session.execute(query):
        texts.setdefault(image_id, []).append(text)
    with_captions = [image for image in found.images if image.id in texts]
    if not with_captions:
        raise InvalidInput(
            f"{job_id} has no usable caption of an image of this split; caption the split, or leave 'caption_job_id' "
            "out",
            code="no_captions_of_split",
            param="caption_job_id",
        )
    found.captioned = [with_captions[i] for i in sample(len(with_captions), retrieval.LIMIT)]
    found.captions = [(i, text) for i, image in enumerate(found.captioned) for text in texts[image.id]]
