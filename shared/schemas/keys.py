from typing import Annotated, Literal

from pydantic import Field

from shared.schemas.common import Request, Resource, UnixTime


class KeyRequest(Request):
    owner: str = Field(min_length=1, max_length=100, pattern=r"^[\w.@-]+$")
    name: str = Field(default="", max_length=100)
    scopes: Annotated[list[Literal["read", "write", "admin"]], Field(min_length=1)] = ["read", "write"]


class Key(Resource):
    object: Literal["api_key"] = "api_key"
    id: str
    owner: str
    name: str
    scopes: list[str]
    created_at: UnixTime
    revoked_at: UnixTime | None = None


class NewKey(Key):
    key: str = Field(description="shown this once; only its hash is kept")
