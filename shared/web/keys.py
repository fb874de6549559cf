"""REST: the API keys of all services. For admins; one service serves it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db.models import ApiKey
from shared.errors import Conflict
from shared.schemas import common
from shared.schemas import keys as schema
from shared.web import idempotency
from shared.web.api import After, CoreDep, IdempotencyKey, Limit
from shared.web.auth import Admin, create_key, revoke_key
from shared.web.paging import page

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.post("", status_code=201, response_model=schema.NewKey, summary="Make an API key")
def make_key(body: schema.KeyRequest, core: CoreDep, who: Admin, idempotency_key: IdempotencyKey = None) -> Any:
    """The key is in this answer and nowhere else. A request repeated with its Idempotency-Key makes no second one, and
    is refused (409), as the first one's key cannot be told again."""
    made: list[tuple[ApiKey, str]] = []

    def create(session: Session) -> str:
        made.append(
            create_key(
                session,
                owner=body.owner,
                name=body.name,
                scopes=tuple(body.scopes),
                expires_at=_end(body),
                rate_limit=body.rate_limit,
            )
        )
        return made[0][0].id

    asked = f"POST {router.prefix} {body.model_dump_json()}"
    with core.transaction() as session:
        id = idempotency.once(session, who, idempotency_key, asked, lambda: create(session), ApiKey)
        if not made:
            raise Conflict(
                f"this Idempotency-Key made {id}, whose key was told once; if it is lost, revoke it and make another",
                code="already_made",
                param="Idempotency-Key",
            )
        row, secret = made[0]
        return schema.NewKey(**schema.Key.model_validate(row).model_dump(), key=secret)


def _end(body: schema.KeyRequest) -> datetime | None:
    if body.expires_in_days is not None:
        return datetime.now(UTC) + timedelta(days=body.expires_in_days)
    return None if body.expires_at is None else datetime.fromtimestamp(body.expires_at, UTC)


@router.get("", response_model=common.Page[schema.Key], summary="List API keys")
def list_keys(core: CoreDep, who: Admin, after: After = None, limit: Limit = 100) -> Any:
    with core.db.snapshot() as session:
        rows, more = page(session, select(ApiKey), ApiKey.id, after, limit)
    return common.Page.of([schema.Key.model_validate(row) for row in rows], more)


@router.delete("/{id}", status_code=204, summary="Revoke an API key, at once")
def revoke(id: str, core: CoreDep, who: Admin) -> None:
    """Refused (409) for the last usable key with scope admin."""
    with core.transaction() as session:
        revoke_key(session, id)
