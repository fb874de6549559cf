"""One thing of every kind, as the services leave it behind, for whatever attacks them."""

from dataclasses import dataclass

from sqlalchemy import select, update

from shared.core import Core
from shared.db.models import Image, Job
from tests.integration.factories import (
    add_caption,
    add_checkpoint,
    add_classifier,
    add_dataset,
    add_group,
    add_job,
    add_predictions,
    caption_request,
    fine_tune_request,
)


@dataclass(frozen=True)
class Belongings:
    dataset: str
    image: str
    caption_job: str
    caption: str
    fine_tuning_job: str
    classifier: str
    evaluation: str
    group: str


def belongings(core: Core, owner: str = "anna", caption: str = "a soft coat", **dataset: object) -> Belongings:
    """`dataset`: columns of the data set."""
    dataset_id = add_dataset(core, owner, images=2, val=2, **dataset)
    with core.transaction() as session:
        image = session.scalars(select(Image).where(Image.dataset_id == dataset_id).order_by(Image.id)).first()
    assert image is not None
    job = {"owner": owner, "dataset_id": dataset_id}
    caption_job = add_job(core, "caption", request=caption_request(dataset_id), status="succeeded", **job)  # type: ignore[arg-type]
    caption_id = add_caption(core, image, caption_job, caption)
    group = add_group(core, dataset_id, owner=owner)
    fine_tuning_job = add_job(core, "fine_tune", request=fine_tune_request(dataset_id), group_id=group, **job)  # type: ignore[arg-type]
    add_checkpoint(core, fine_tuning_job)
    scores = {"top1": 0.5, "macro_f1": 0.4}
    classifier = add_classifier(core, dataset_id, scores, owner=owner, correct=[True, False])
    add_classifier(core, dataset_id, scores, owner=owner, correct=[True, True], method="mmft", seed=1)
    with core.transaction() as session:  # what every evaluation says of itself
        session.execute(update(Job).where(Job.kind == "evaluate").values(result={"classes": 2, "scores": scores}))
    evaluation = _evaluated(core, owner, classifier, dataset_id)
    return Belongings(dataset_id, image.id, caption_job, caption_id, fine_tuning_job, classifier, evaluation, group)


def _evaluated(core: Core, owner: str, classifier_id: str, dataset_id: str) -> str:
    """One of the val split, with the predictions that it kept, of one image."""
    id = add_job(
        core,
        "evaluate",
        owner=owner,
        request={"classifier_id": classifier_id, "split": "val"},
        dataset_id=dataset_id,
        status="succeeded",
        result={"classes": 2, "scores": {}},
    )
    add_predictions(core, id, classifier_id, dataset_id, owner)
    return id
