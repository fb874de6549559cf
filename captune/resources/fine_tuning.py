"""Fine-tuning jobs and groups of them."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from captune.transport import RECONNECTS, Transport
from shared.schemas.fine_tuning import (
    FineTuningCheckpoint,
    FineTuningJob,
    FineTuningRequest,
    Group,
    GroupRequest,
    GroupRuns,
    Method,
    SoupRequest,
)

_GROUPS = "/v1/fine_tuning/groups"


class FineTuning(Transport):
    def train(self, **request: Any) -> FineTuningJob:
        """Fields: shared.schemas.fine_tuning.FineTuningRequest."""
        body = FineTuningRequest(**request)
        return FineTuningJob.model_validate(self._post("/v1/fine_tuning/jobs", body.model_dump()))

    def group(self, group_id: str) -> Group:
        return Group.model_validate(self._send("GET", f"{_GROUPS}/{group_id}").json())

    def groups(self, **filters: str) -> Iterator[Group]:
        return self._list(_GROUPS, Group, **filters)

    def sweep(self, **request: Any) -> Group:
        """A run for every combination of lists. Fields: shared.schemas.fine_tuning.GroupRequest."""
        return Group.model_validate(self._post(_GROUPS, GroupRequest(**request).model_dump()))

    def extend_group(self, group_id: str, **request: Any) -> Group:
        """Adds the combinations that the group has not yet. Fields: shared.schemas.fine_tuning.GroupRuns."""
        return Group.model_validate(self._post(f"{_GROUPS}/{group_id}/runs", GroupRuns(**request).model_dump()))

    def cancel_group(self, group_id: str) -> Group:
        return Group.model_validate(self._post(f"{_GROUPS}/{group_id}/cancel", None))

    def soup(self, group_id: str, **request: Any) -> FineTuningJob:
        """Averages a group's fine-tunes, greedily. Fields: shared.schemas.fine_tuning.SoupRequest."""
        return FineTuningJob.model_validate(
            self._post(f"{_GROUPS}/{group_id}/soup", SoupRequest(**request).model_dump())
        )

    def wait_group(self, group_id: str, on_update: Callable[[Group], None] | None = None) -> Group:
        """Block until every run of the group, and its evaluation, is final."""
        failures = 0
        while True:
            try:
                group = self.group(group_id)
                failures = 0
            except httpx.TransportError:
                failures += 1
                if failures > RECONNECTS:
                    raise
            else:
                if on_update is not None:
                    on_update(group)
                if group.status == "finished":
                    return group
            time.sleep(1.0)

    def methods(self) -> list[Method]:
        return [Method.model_validate(m) for m in self._send("GET", "/v1/fine_tuning/methods").json()["data"]]

    def checkpoints(self, job_id: str) -> Iterator[FineTuningCheckpoint]:
        return self._list(f"/v1/fine_tuning/jobs/{job_id}/checkpoints", FineTuningCheckpoint)
