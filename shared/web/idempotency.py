"""`Idempotency-Key`: a repeated POST gets the resource that the first one made. The key is stored in the transaction
that makes the resource, so both exist or neither does."""

import hashlib
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.models import Base, IdempotencyKey, Job
from shared.errors import Conflict, InvalidInput
from shared.web.auth import Principal


def once(
    session: Session, who: Principal, key: str | None, request: str, create: Callable[[], str], of: type[Base] = Job
) -> str:
    """The id, of a row of `of`, that `create` returned for this (owner, key), now or before. `request` stands for what
    was asked: the route and the body. The same key with another request is refused (422), and with one of an admin who
    has the same owner, where it made what this caller may not see; so are a request still in flight and a resource that
    was deleted since (409)."""
    owner = who.owner
    if key is None:
        return create()
    lock = int.from_bytes(hashlib.sha256(f"{owner}\0{key}".encode()).digest()[:8], signed=True)
    if not session.scalar(select(func.pg_try_advisory_xact_lock(lock))):
        raise Conflict("a request with this Idempotency-Key is in flight; wait for it", code="in_flight", retry_after=1)
    digest = hashlib.sha256(request.encode()).hexdigest()
    row = session.get(IdempotencyKey, (owner, key))
    if row is None:
        resource_id = create()
        session.add(IdempotencyKey(owner=owner, key=key, request_hash=digest, resource_id=resource_id))
        return resource_id
    if row.request_hash != digest:
        raise _reused()
    # Locked, so that it is there for as long as the answer is made of it.
    found: Any = session.get(of, row.resource_id, with_for_update={"read": True, "key_share": True})
    if found is None:
        raise Conflict(
            f"this Idempotency-Key made {row.resource_id}, which was deleted since; use a new key for a new request",
            code="resource_deleted",
            param="Idempotency-Key",
        )
    if not who.may_see(found.owner):
        raise _reused()
    return row.resource_id


def _reused() -> InvalidInput:
    return InvalidInput(
        "this Idempotency-Key was used for another request; use a new key for a new request",
        code="idempotency_key_reused",
        param="Idempotency-Key",
    )
