"""What an evaluation leaves in the ledger: its row, its scores, for a bare model its classifier. One evaluation stands
for each (classifier, data set, split, head): a later one takes the place of the earlier, whose file goes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from services.evaluator.scoring import bare
from services.evaluator.scoring.gathering import Sources, deleted
from services.evaluator.scoring.upserts import KEY, upsert, write_scores
from shared.db.models import Classifier, Dataset, Evaluation, Score
from shared.errors import Conflict, NotFound
from shared.jobs.claim import Claim
from shared.leaderboard_version import bump
from shared.schemas.evaluations import EvaluationRequest


@dataclass(frozen=True)
class Scored:
    """scores: metrics by name. result: the tables. correct (N,): in the order of the images' paths. folder: the store's
    key of a bare model's classifier, where it had none on this data set."""

    scores: dict[str, float]
    result: dict[str, Any]
    correct: NDArray[np.bool_]
    predictions_key: str
    folder: str | None

    def write(self, session: Session, claim: Claim, request: EvaluationRequest, sources: Sources) -> dict[str, Any]:
        """In the transaction that ends the job. Returns the job's result."""
        classifier = self._classifier(session, claim, request, sources)
        key = dict(zip(KEY, (classifier.id, sources.dataset.id, request.split, request.head), strict=True))
        fingerprint = str(sources.dataset.fingerprint)
        earlier = session.scalar(select(Evaluation).filter_by(**key))
        if earlier is not None:
            if earlier.data_fingerprint != fingerprint:
                self._refuse_stale(session, sources, earlier)
            session.info.setdefault("obsolete", []).append(earlier.predictions_key)
            if earlier.data_fingerprint != fingerprint:  # what this one did not measure, the other data had
                session.execute(delete(Score).filter_by(**key))
        row = {
            "id": claim.id,
            "owner": claim.owner,
            "data_fingerprint": fingerprint,
            "predictions_key": self.predictions_key,
            "images": len(self.correct),
            "correct": np.packbits(self.correct).tobytes(),
        }
        upsert(session, Evaluation, KEY, [key | row])
        write_scores(session, Evaluation(**key | row), self.scores)
        bump(session, sources.dataset.id)
        return {"classifier_id": classifier.id, "scores": self.scores, **self.result}

    def _refuse_stale(self, session: Session, sources: Sources, earlier: Evaluation) -> None:
        """Scores of what the data set was must not take the place of scores of what it is."""
        now = session.scalar(select(Dataset.fingerprint).where(Dataset.id == sources.dataset.id))
        if earlier.data_fingerprint == now:
            raise Conflict(
                f"the data set {sources.dataset.id} was changed while it was scored, and {earlier.id} has scored it as "
                "it is now; its scores stand",
                code="dataset_changed",
                param="dataset_id",
            )

    def _classifier(self, session: Session, claim: Claim, request: EvaluationRequest, sources: Sources) -> Classifier:
        """Locked, so that it is not deleted meanwhile and evaluations of it follow one another."""
        if sources.classifier is None:
            assert request.model is not None
            assert self.folder is not None
            query = select(Dataset.id).where(Dataset.id == sources.dataset.id).with_for_update()
            if session.scalar(query) is None:
                raise NotFound(f"the data set {sources.dataset.id} was deleted", code="dataset_deleted")
            # As it was scored: its classes may have been renamed since, and the head has the old names.
            found = bare.find(session, request.model, sources.dataset)
            if found is None:
                return bare.add(session, claim.id, request.model, sources.dataset, self.folder)
            session.info.setdefault("obsolete", []).append(self.folder)  # another job was first
        else:
            found = sources.classifier
        row = session.scalar(select(Classifier).where(Classifier.id == found.id).with_for_update())
        if row is None:
            raise deleted(request, found.id)
        return row
