"""Bearer API keys: hashed at rest, with scopes read / write / admin; on by default for everything under /v1."""

import hashlib
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import ColumnElement, Row, and_, bindparam, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.core import Core
from shared.db.models import ApiKey
from shared.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthorized
from shared.ids import new_id
from shared.web.rate_limit import RateLimits

log = logging.getLogger(__name__)

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
KEY_PREFIX = "ck_"
SHOWN = 8  # characters of a key that a list shows: 30 of its 256 bits
USED_EVERY = timedelta(minutes=1)  # how often, at most, a key's last use is written

COUNTED = "captune.counted"  # in a request's scope: its key was counted

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer ck_…`")

_USABLE = (ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
_UNWRITTEN = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - USED_EVERY)

# The key is looked for by its hash, through an index, whose comparisons do take longer the more of the hash is right.
# That tells a caller nothing of use: it cannot choose what SHA-256 makes of its guesses, and to know all of a hash is
# not to know the key, of which there are 2^256. What may be short, the operator's service token, is compared in
# constant time.
_FIND = select(
    *(ApiKey.id, ApiKey.owner, ApiKey.name, ApiKey.scopes, ApiKey.rate_limit, ApiKey.revoked_at, ApiKey.expires_at),
    and_(*_USABLE).label("usable"),
    _UNWRITTEN.label("stale"),
).where(ApiKey.key_hash == bindparam("key_hash"))
# Of many requests at once one writes, and none waits for it.
_THIS = select(ApiKey.id).where(ApiKey.id == bindparam("key_id"), _UNWRITTEN).with_for_update(skip_locked=True)
_USED = update(ApiKey).where(ApiKey.id.in_(_THIS)).values(last_used_at=func.now())


@dataclass(frozen=True)
class Principal:
    owner: str
    scopes: frozenset[str]
    key_name: str = ""  # who, among those with the owner's keys
    key_hash: str | None = None  # None: the service's token, which is good for as long as the process

    def sees(self, owner_column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """The WHERE clause that keeps one owner's rows from another; an admin sees all."""
        return owner_column.is_not(None) if "admin" in self.scopes else owner_column == self.owner

    def may_see(self, owner: str) -> bool:
        return "admin" in self.scopes or owner == self.owner


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_secret() -> str:
    """256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def ensure_key(session: Session, key: str, *, owner: str, name: str, scopes: tuple[Scope, ...] = SCOPES) -> bool:
    """Store a key that the operator chose; a no-op where it is stored already. False where it was revoked or has
    expired, and so stays."""
    key_hash = hash_key(key)
    values = {"owner": owner, "name": name, "prefix": _shown(key), "key_hash": key_hash, "scopes": list(scopes)}
    session.execute(insert(ApiKey).values(id=new_id("key"), **values).on_conflict_do_nothing())
    return session.scalar(select(ApiKey.id).where(ApiKey.key_hash == key_hash, *_USABLE)) is not None


def create_key(
    session: Session,
    *,
    owner: str,
    name: str,
    scopes: tuple[Scope, ...],
    expires_at: datetime | None = None,
    rate_limit: str | None = None,
) -> tuple[ApiKey, str]:
    """Returns the row and the key itself, which is shown once and never stored. Raises InvalidInput where it would
    have expired already."""
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise InvalidInput("expires_at has passed already; give a time to come", param="expires_at")
    secret = new_secret()
    row = ApiKey(
        id=new_id("key"),
        owner=owner,
        name=name,
        prefix=_shown(secret),
        key_hash=hash_key(secret),
        scopes=list(scopes),
        expires_at=expires_at,
        rate_limit=rate_limit,
    )
    session.add(row)
    session.flush()
    return row, secret


def revoke_key(session: Session, id: str) -> None:
    """A no-op where it was revoked before. Raises NotFound; Conflict where no key would be left that can make others:
    then another must be made first. (An operator always can: CAPTUNE_BOOTSTRAP_KEY.)"""
    row = session.get(ApiKey, id)
    if row is None:
        raise NotFound(f"there is no key '{id}'; GET /v1/keys lists them", param="id")
    if row.revoked_at is not None:
        return
    # Locked, so that of two that revoke each other's key the second sees what the first did.
    admins = select(ApiKey.id).where(ApiKey.scopes.contains(["admin"]), *_USABLE).order_by(ApiKey.id)
    if list(session.scalars(admins.with_for_update())) == [id]:
        raise Conflict(
            "this is the last key with scope 'admin': without it nobody could make or revoke keys; make another first",
            code="last_admin_key",
            param="id",
        )
    row.revoked_at = func.now()


def valid_hashes(session: Session, hashes: Collection[str]) -> set[str]:
    """Those of keys that may still be used."""
    return set(session.scalars(select(ApiKey.key_hash).where(ApiKey.key_hash.in_(hashes), *_USABLE)))


def _shown(key: str) -> str:
    """Nothing of a short key, which somebody made up."""
    return key[:SHOWN] if len(key) >= 40 else ""


def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """Raises Unauthorized, and TooBusy where the key, or wrong keys from the caller's address, came too often."""
    if credentials is None:
        raise Unauthorized("no API key was sent; add the header 'Authorization: Bearer <key>'")
    core: Core = request.app.state.core
    limits: RateLimits = request.app.state.rate_limits
    key = credentials.credentials
    token = core.settings.service_token
    if token is not None and secrets.compare_digest(key.encode(), token.get_secret_value().encode()):
        return Principal(owner="service", scopes=frozenset({"read", "write"}), key_name="service")
    key_hash, host = hash_key(key), request.client.host if request.client else None
    limits.check_address(host, key_hash)
    row = _find(core, request.app.state.keys_marked, key_hash)
    if row is None or not row.usable:
        limits.failed(host, key_hash)
        raise _refusal(row)
    limits.succeeded(key_hash)
    if not request.scope.get(COUNTED):  # an upload's key is looked at before its body and after it
        limits.count(row.id, row.rate_limit)
        request.scope[COUNTED] = True
    return Principal(owner=row.owner, scopes=frozenset(row.scopes), key_name=row.name, key_hash=key_hash)


def _find(core: Core, marked: dict[str, float], key_hash: str) -> Row[*tuple[Any, ...]] | None:
    """The key's row, in one round trip; once a minute its use is written as well. `marked`: when this process last
    tried, by key id, so that a write that fails (a full disk) is not tried with every request."""
    with core.db.autocommit() as connection:
        row = connection.execute(_FIND, {"key_hash": key_hash}).one_or_none()
        if row is not None and row.usable and row.stale:
            now = time.monotonic()
            if now - marked.get(row.id, -math.inf) >= USED_EVERY.total_seconds():
                marked[row.id] = now
                try:
                    connection.execute(_USED, {"key_id": row.id})
                except DBAPIError as error:
                    log.warning("the use of a key was not written", extra={"key_id": row.id, "error": str(error.orig)})
    return row


def _refusal(row: Row[*tuple[Any, ...]] | None) -> Unauthorized:
    if row is None or row.revoked_at is not None:
        return Unauthorized("this API key is unknown or was revoked; make one with 'captune keys create'")
    ended = row.expires_at.astimezone(UTC)
    return Unauthorized(
        f"this API key expired on {ended:%Y-%m-%d at %H:%M} UTC; make another with 'captune keys create'",
        code="key_expired",
    )


def check_scope(principal: Principal, scope: Scope) -> None:
    """`write` and `admin` keys may also read; `admin` may do all. Raises Forbidden."""
    allowed = {"read": {"read", "write", "admin"}, "write": {"write", "admin"}, "admin": {"admin"}}[scope]
    if not principal.scopes & allowed:
        has = ", ".join(sorted(principal.scopes)) or "none"
        raise Forbidden(f"this needs a key with scope '{scope}'; yours has: {has}", code="missing_scope")


def require(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    """A route dependency. (Async, as it does not wait: it needs no thread.)"""

    async def dependency(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        check_scope(principal, scope)
        return principal

    return dependency


def admit_body(request: Request) -> Principal:
    """The check that every route makes, for before its body is read. Raises Unauthorized or TooBusy."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    sent = HTTPAuthorizationCredentials(scheme=scheme, credentials=key) if scheme.lower() == "bearer" and key else None
    return authenticate(request, sent)


def admit_upload(request: Request) -> None:
    """The check that a writing route makes, for before its body is read. Raises Forbidden too."""
    check_scope(admit_body(request), "write")


def admit_metrics(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Where `/metrics` is closed: the metrics token, and keys with scope admin, as the numbers are of all owners."""
    token = request.app.state.core.settings.metrics_token
    sent = b"" if credentials is None else credentials.credentials.encode()
    if token is None or not secrets.compare_digest(sent, token.get_secret_value().encode()):
        check_scope(authenticate(request, credentials), "admin")


Reader = Annotated[Principal, Depends(require("read"))]
Writer = Annotated[Principal, Depends(require("write"))]
Admin = Annotated[Principal, Depends(require("admin"))]
