"""Evaluations: asked for, scored anew, their predictions."""

from pathlib import Path
from typing import Any

from captune.transport import Transport
from shared.schemas.evaluations import Evaluation, EvaluationRequest


class Evaluations(Transport):
    def evaluate(self, classifier_id: str | None = None, **request: Any) -> Evaluation:
        """Further fields: shared.schemas.evaluations.EvaluationRequest."""
        body = EvaluationRequest(classifier_id=classifier_id, **request)
        return Evaluation.model_validate(self._post("/v1/evaluations", body.model_dump()))

    def rescore(self, evaluation_id: str) -> Evaluation:
        """Every metric anew, from the predictions kept."""
        return Evaluation.model_validate(self._send("POST", f"/v1/evaluations/{evaluation_id}/rescore").json())

    def save_predictions(self, evaluation_id: str, path: str | Path) -> Path:
        """Write the logits of every image to `path`, as Parquet."""
        return self._download(f"/v1/evaluations/{evaluation_id}/predictions", Path(path))
