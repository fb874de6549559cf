"""Lists: newest first, `after` + `limit`, `has_more`. Ids sort by creation time, so the id is the cursor."""

from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select
from sqlalchemy.orm import InstrumentedAttribute, Session

T = TypeVar("T")


def page(
    session: Session,
    query: Select[T],
    id_column: InstrumentedAttribute[str] | ColumnElement[str],
    after: str | None,
    limit: int,
    *,
    ascending: bool = False,
) -> tuple[list[T], bool]:
    """At most `limit` rows, and whether there are more."""
    if after is not None:
        query = query.where(id_column > after if ascending else id_column < after)
    ordered: Select[Any] = query.order_by(id_column.asc() if ascending else id_column.desc()).limit(limit + 1)
    rows = list(session.scalars(ordered).all())
    return rows[:limit], len(rows) > limit
