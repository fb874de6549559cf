"""Bearer API keys: hashed at rest, with scopes read / write / admin; on by default for everything under /v1."""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import ColumnElement, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.db.models import ApiKey
from shared.errors import Forbidden, Unauthorized
from shared.ids import new_id

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
KEY_PREFIX = "ck_"

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer ck_…`")


@dataclass(frozen=True)
class Principal:
    owner: str
    scopes: frozenset[str]
    key_name: str = ""  # who, among those with the owner's keys

    def sees(self, owner_column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """The WHERE clause that keeps one owner's rows from another; an admin sees all."""
        return owner_column.is_not(None) if "admin" in self.scopes else owner_column == self.owner


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def ensure_key(session: Session, key: str, *, owner: str, name: str, scopes: tuple[Scope, ...] = SCOPES) -> None:
    """Store a key that the operator chose; a no-op where it is stored already."""
    session.execute(
        insert(ApiKey)
        .values(id=new_id("key"), owner=owner, name=name, key_hash=hash_key(key), scopes=list(scopes))
        .on_conflict_do_nothing()
    )


def create_key(session: Session, *, owner: str, name: str, scopes: tuple[Scope, ...]) -> tuple[ApiKey, str]:
    """Returns the row and the key itself, which is shown once and never stored."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    row = ApiKey(id=new_id("key"), owner=owner, name=name, key_hash=hash_key(secret), scopes=list(scopes))
    session.add(row)
    session.flush()
    return row, secret


def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    if credentials is None:
        raise Unauthorized("no API key was sent; add the header 'Authorization: Bearer <key>'")
    core = request.app.state.core
    key = credentials.credentials
    token = core.settings.service_token
    if token is not None and secrets.compare_digest(key.encode(), token.get_secret_value().encode()):
        return Principal(owner="service", scopes=frozenset({"read", "write"}), key_name="service")
    with core.transaction() as session:
        row = session.scalar(select(ApiKey).where(ApiKey.key_hash == hash_key(key)))
    if row is None or row.revoked_at is not None:
        raise Unauthorized("this API key is unknown or was revoked; make one with 'captune keys create'")
    return Principal(owner=row.owner, scopes=frozenset(row.scopes), key_name=row.name)


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


def admit_upload(request: Request) -> None:
    """The check that a writing route makes, for before its body is read. Raises Unauthorized or Forbidden."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    sent = HTTPAuthorizationCredentials(scheme=scheme, credentials=key) if scheme.lower() == "bearer" and key else None
    check_scope(authenticate(request, sent), "write")


Reader = Annotated[Principal, Depends(require("read"))]
Writer = Annotated[Principal, Depends(require("write"))]
Admin = Annotated[Principal, Depends(require("admin"))]
