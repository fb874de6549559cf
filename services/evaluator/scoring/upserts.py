"""Rows that stand once for what they are about, whoever wrote them first. No torch."""

from typing import Any

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.db.models import Evaluation, Score

KEY = ("classifier_id", "dataset_id", "split", "head")


def write_scores(session: Session, of: Evaluation, scores: dict[str, float]) -> None:
    """One score for each metric of (classifier, data set, split, head), whatever stood there."""
    key = {name: getattr(of, name) for name in KEY}
    rows = [key | {"metric": name, "value": value, "evaluation_id": of.id} for name, value in scores.items()]
    upsert(session, Score, (*KEY, "metric"), rows)


def upsert(session: Session, table: type[Any], key: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """The rows as they are given, whatever stood under their keys; `created_at` is anew."""
    statement = insert(table)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in key}
    changed["created_at"] = statement.excluded.created_at
    session.execute(statement.on_conflict_do_update(index_elements=key, set_=changed), rows)
