"""What the protocol does where the server fails it. (With a server: tests/e2e/test_bench.py.)"""

from types import SimpleNamespace
from typing import Any

import httpx

from captune.bench import READERS
from captune.bench.plan import Settings
from captune.bench.protocol import Protocol
from captune.bench.results import Result
from captune.errors import CaptuneAPIError


def test_runs_that_cannot_be_read_cost_no_other_data_set_its_table() -> None:
    def wait_group(*_: Any) -> Any:
        raise CaptuneAPIError.from_response(httpx.Response(404, json={"detail": "there is no group"}))

    client: Any = SimpleNamespace(methods=list, wait_group=wait_group)
    protocol = Protocol(client, Settings("starter", methods=()), print)
    asked = Result(dataset="dtd", title="DTD", dataset_id="ds_1", group_id="grp_1")
    found = protocol.collect(asked, READERS["dtd"])
    assert found.rows == []
    assert "there is no group" in (found.error or "")
