from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from shared.schemas.common import Request, Resource, UnixTime

RateLimit = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,8}/(second|minute|hour|day)|off)$"),
    Field(description="requests in a time, as `600/second` (minute, hour, day), or `off`"),
]


class KeyRequest(Request):
    owner: str = Field(min_length=1, max_length=100, pattern=r"^[\w.@-]+$")
    name: str = Field(default="", max_length=100)
    scopes: Annotated[list[Literal["read", "write", "admin"]], Field(min_length=1, max_length=3)] = ["read", "write"]
    expires_at: int | None = Field(
        default=None, ge=0, le=253_402_300_799, description="seconds since 1970-01-01T00:00Z; never, where left out"
    )
    expires_in_days: int | None = Field(default=None, ge=1, le=36_500, description="instead of expires_at")
    rate_limit: RateLimit | None = Field(default=None, description="of this key; the server's, where left out")

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.expires_at is not None and self.expires_in_days is not None:
            raise ValueError("give either expires_at or expires_in_days, not both")
        return self


class Key(Resource):
    object: Literal["api_key"] = "api_key"
    id: str
    owner: str
    name: str
    prefix: str = Field(description="how the key begins, to tell it apart by; empty for one that an operator chose")
    scopes: list[str]
    rate_limit: str | None = None
    created_at: UnixTime
    last_used_at: UnixTime | None = Field(default=None, description="to the minute")
    expires_at: UnixTime | None = None
    revoked_at: UnixTime | None = None


class NewKey(Key):
    key: str = Field(description="shown this once; only its hash is kept")
