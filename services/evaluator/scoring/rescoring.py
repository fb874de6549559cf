"""Metrics of predictions that were kept, without the model: what a new metric says of evaluations made before it."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.evaluator.metrics import Predictions, scores
from services.evaluator.scoring import predictions, tables
from services.evaluator.scoring.upserts import write_scores
from shared.core import Core
from shared.db.models import Classifier, Evaluation, Job
from shared.errors import Conflict, TooLarge
from shared.jobs.routes import get_job
from shared.leaderboard_version import bump
from shared.schemas import evaluations as schema
from shared.web.auth import Principal

MAX_LOGITS = 20_000_000  # images * classes: 160 MB a copy in the API's memory


def standing(session: Session, who: Principal, id: str) -> Evaluation:
    """The row of an evaluation whose predictions are kept. Raises NotFound for another owner's, Conflict for one that
    has not succeeded or that a later one of the same classifier, data set, split and head has replaced."""
    job = get_job(session, who, "evaluate", id)
    row = session.get(Evaluation, id)
    if row is None:
        why = "a later one took its place" if job.status == "succeeded" else f"it is {job.status}"
        raise Conflict(
            f"no predictions of {id} are kept: {why}; GET /v1/evaluations lists them", code="no_predictions", param="id"
        )
    return row


def rescore(
    core: Core, who: Principal, id: str, render: Callable[[Session, Job], schema.Evaluation]
) -> schema.Evaluation:
    """Raises as `standing`, and TooLarge for more predictions than the API should hold."""
    with core.transaction() as session:
        row = standing(session, who, id)
        result = dict(session.get_one(Job, id).result or {})
    if row.images * result["classes"] > MAX_LOGITS:
        raise TooLarge(
            f"{id} has {row.images} images in {result['classes']} classes, more than are scored anew at once; "
            "POST /v1/evaluations scores it again, with the model",
            code="too_many_predictions",
        )
    with core.store.local_file(row.predictions_key) as path:
        kept = predictions.read(path)
    fitted = result.get("temperature")
    predicted = Predictions(kept.logits, kept.labels, fitted["value"] if fitted else None)
    found = scores(predicted)
    with core.transaction() as session:
        # Whoever writes scores of a classifier holds its row, so that they follow one another.
        session.scalar(select(Classifier.id).where(Classifier.id == row.classifier_id).with_for_update())
        row = standing(session, who, id)
        job = get_job(session, who, "evaluate", id, lock=True)
        write_scores(session, row, found)
        job.result = result | {
            "scores": result.get("scores", {}) | found,
            "per_class": tables.per_class(predicted, kept.class_names),
            "confusions": tables.confusions(predicted, kept.class_names),
        }
        bump(session, row.dataset_id)
        session.flush()
        return render(session, job)
