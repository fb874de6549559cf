"""The owner's data sets in the database."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.datasets.splits import few_shot
from shared.db.models import Dataset, Image, Job
from shared.errors import Conflict, NotFound
from shared.web.auth import Principal


def get_dataset(session: Session, who: Principal, dataset_id: str, *, lock: bool = False) -> Dataset:
    """Raises NotFound, also where it is another owner's."""
    query = select(Dataset).where(Dataset.id == dataset_id, who.sees(Dataset.owner))
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(
            f"there is no data set '{dataset_id}' among yours; GET /v1/datasets lists them", param="dataset_id"
        )
    return row


def usable_dataset(session: Session, who: Principal, dataset_id: str, *, lock: bool = False) -> Dataset:
    """A data set whose ingestion has succeeded, else Conflict. `lock` keeps it from being deleted meanwhile."""
    row = get_dataset(session, who, dataset_id, lock=lock)
    status = session.get_one(Job, dataset_id).status
    if status != "succeeded":
        detail = "look at its 'error'" if status == "failed" else "wait until it has succeeded"
        raise Conflict(
            f"the ingestion of {dataset_id} is {status}; {detail}", code="dataset_not_ready", param="dataset_id"
        )
    return row


def display_names(dataset: Dataset) -> dict[str, str]:
    """How captions call each class: the name its owner gave it, else its folder's name in words. By class name, in
    label order; empty before the ingestion has ended."""
    return {each["name"]: each["display_name"] for each in dataset.classes or ()}


def split_images(session: Session, dataset_id: str, split: str) -> Sequence[Image]:
    """Every image of a split, ordered by path."""
    query = select(Image).where(Image.dataset_id == dataset_id, Image.split == split)
    return session.scalars(query.order_by(Image.path)).all()


def draw_shots(images: Sequence[Image], shots: int | None, shot_seed: int) -> tuple[list[Image], dict[str, int]]:
    """The few-shot subset, the same for captioning and for training, and the classes that have fewer than `shots`."""
    if shots is None:
        return list(images), {}
    by_class: dict[str, list[str]] = {}
    for image in images:
        by_class.setdefault(image.class_name, []).append(image.path)
    chosen, fewer = few_shot(by_class, shots, shot_seed)
    keep = set(chosen)
    return [image for image in images if image.path in keep], fewer
