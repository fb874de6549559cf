"""The evaluation job: a classifier's logits over a split, and every metric of them."""

import torch
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.evaluator.metrics import score
from shared.classifier import load_classifier
from shared.datasets.lookup import split_images
from shared.datasets.tensors import load_images
from shared.db.models import Classifier, Dataset, Score
from shared.errors import InvalidInput, NotFound
from shared.jobs.claim import Claim
from shared.jobs.worker import Finish
from shared.schemas.evaluations import EvaluationRequest

CHUNK = 256  # images in memory at a time


def evaluate(claim: Claim) -> Finish:
    request = EvaluationRequest.model_validate(claim.request)
    with claim.core.transaction() as session:
        row = session.scalar(select(Classifier).where(Classifier.id == request.classifier_id))
        if row is None:
            raise NotFound(f"the classifier {request.classifier_id} was deleted", param="classifier_id")
        dataset = session.get(Dataset, row.dataset_id)
        if dataset is None:
            raise NotFound(f"the data set {row.dataset_id} was deleted", param="dataset_id")
        images = split_images(session, dataset.id, request.split)
    if not images:
        raise InvalidInput(f"the split '{request.split}' has no images", code="empty_split", param="split")
    claim.progress("loading the model", 0, 1)
    with claim.core.store.local_folder(row.storage_key) as folder:
        classifier = load_classifier(folder, "cuda" if torch.cuda.is_available() else "cpu")
    names = [c["name"] for c in dataset.classes or ()]
    if names != classifier.card.class_names:
        raise InvalidInput(
            f"the classifier's {len(classifier.card.class_names)} classes are not the data set's {len(names)} classes",
            code="class_lists_differ",
        )
    labels = {name: i for i, name in enumerate(names)}
    logits = []
    for start in range(0, len(images), CHUNK):
        claim.progress("scoring", start, len(images))
        part = load_images(claim.core.store, images[start : start + CHUNK], classifier.clip, lambda _: claim.check())
        logits.append(classifier.logits(part))
    scores = score(torch.cat(logits), [labels[image.class_name] for image in images])

    def finish(session: Session) -> dict[str, int]:
        rows = [
            {
                "classifier_id": row.id,
                "split": request.split,
                "metric": metric,
                "value": value,
                "evaluation_id": claim.id,
            }
            for metric, value in scores.items()
        ]
        session.execute(insert(Score).on_conflict_do_nothing(), rows)
        return {"images": len(images), "classes": len(names)}

    return finish
