"""API keys."""

from collections.abc import Iterator
from typing import Any

from captune.transport import Transport
from shared.schemas.keys import Key, KeyRequest, NewKey


class Keys(Transport):
    def create_key(self, **request: Any) -> NewKey:
        """Fields: shared.schemas.keys.KeyRequest."""
        return NewKey.model_validate(self._post("/v1/keys", KeyRequest(**request).model_dump()))

    def keys(self) -> Iterator[Key]:
        return self._list("/v1/keys", Key)

    def revoke_key(self, key_id: str) -> None:
        self._send("DELETE", f"/v1/keys/{key_id}")
