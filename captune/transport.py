"""How the client speaks HTTP: its connection, refusals as exceptions, pages, downloads, server-sent events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from captune import connection
from captune.errors import CaptuneAPIError

M = TypeVar("M", bound=BaseModel)

LONG = httpx.Timeout(60.0, read=600.0, write=600.0)  # uploads, and what a model or a whole job is looked at for
RECONNECTS = 30  # a connection that breaks is taken up again where it was, a second apart


class Transport:
    """Raises CaptuneAPIError where the server refuses, httpx.TransportError where it cannot be reached."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        state_dir: Path | None = None,
        timeout: float = 60.0,
    ) -> None:
        found = connection.find(url, api_key, state_dir)
        self.url = found.url.rstrip("/")
        headers = {"Authorization": f"Bearer {found.api_key}"}
        local = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")  # a proxy has no business there
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=not local)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self._http.request(method, path, **options)
        if not response.is_success:
            raise CaptuneAPIError.from_response(response)
        return response

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        return self._send("POST", path, json=body).json()

    def _download(self, url: str, path: Path, params: dict[str, str] | None = None) -> Path:
        """Stream an answer into `path`, which appears once it is whole."""
        part = path.with_name(f"{path.name}.part")
        with self._http.stream("GET", url, params=params, timeout=LONG) as response:
            if not response.is_success:
                response.read()
                raise CaptuneAPIError.from_response(response)
            try:
                with part.open("wb") as out:
                    for piece in response.iter_bytes():
                        out.write(piece)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def _list(self, path: str, model: type[M], **filters: Any) -> Iterator[M]:
        params: dict[str, Any] = {"limit": 200, **filters}
        while True:
            answer = self._send("GET", path, params=params).json()
            for entry in answer["data"]:
                yield model.model_validate(entry)
            if not answer["has_more"]:
                return
            params["after"] = answer["last_id"]


def given(filters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in filters.items() if value is not None}


def server_sent_events(lines: Iterator[str]) -> Iterator[tuple[str, str | None, Any]]:
    """(event, id, data as JSON) of each."""
    kind, number, data = "message", None, ""
    for line in lines:
        if not line:
            if data:
                yield kind, number, json.loads(data)
            kind, number, data = "message", None, ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            kind = value
        elif field == "id":
            number = value
        elif field == "data":
            data += value
