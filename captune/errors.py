"""What the client raises."""

from typing import Any

import httpx


class ConnectionNotFound(Exception):
    """No server was named and none was found."""


class CaptuneAPIError(Exception):
    """The server refused: `status`, `code`, `param` and the server's own words."""

    def __init__(self, status: int, detail: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.code, self.param = status, detail, code, param

    @classmethod
    def from_response(cls, response: httpx.Response) -> "CaptuneAPIError":
        body: dict[str, Any] = {}
        if "json" in response.headers.get("content-type", ""):
            found = response.json()
            body = found if isinstance(found, dict) else {}
        detail = str(body.get("detail") or f"the server answered {response.status_code}")
        return cls(response.status_code, detail, body.get("code"), body.get("param"))
