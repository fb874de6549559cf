"""The leaderboard: whole, as text, watched, two rows of it compared."""

import time
from collections.abc import Iterator
from typing import Any

from captune.errors import CaptuneAPIError
from captune.transport import Transport, given
from shared.schemas.evaluations import Comparison, Leaderboard


class Leaderboards(Transport):
    def leaderboard(self, dataset_id: str, **filters: Any) -> Leaderboard:
        """`filters`: metric, split, head, shots (a number or "full"), model, method, captioner, protocol, tag,
        group_id, order (best, asc, desc); those that are None do not count. Every row, unless `limit` or `after` (a
        row's id) asks for one page."""
        params = {"dataset_id": dataset_id, **given(filters)}
        one_page = "limit" in params or "after" in params
        board = self._leaderboard(params if one_page else params | {"limit": 1000})
        page = board
        while page.has_more and not one_page:
            page = self._leaderboard(params | {"limit": 1000, "after": page.last_id})
            board.rows += page.rows
            board.has_more, board.last_id = page.has_more, page.last_id
        return board

    def _leaderboard(self, params: dict[str, Any]) -> Leaderboard:
        return Leaderboard.model_validate(self._send("GET", "/v1/leaderboard", params=params).json())

    def leaderboard_text(self, dataset_id: str, format: str, **filters: Any) -> tuple[str, bool]:
        """At most 1,000 rows as csv, markdown or latex, and whether there are more. `filters`: those of
        `leaderboard`."""
        params = {"dataset_id": dataset_id, "format": format, "limit": 1000, **given(filters)}
        answer = self._send("GET", "/v1/leaderboard", params=params)
        return answer.text, "next" in answer.links

    def watch_leaderboard(self, dataset_id: str, *, every: float = 2.0, **filters: Any) -> Iterator[Leaderboard]:
        """One page, now and whenever it has changed; asks every so many seconds, which costs next to nothing while
        nothing has. `filters`: those of `leaderboard`, limit, after."""
        params = {"dataset_id": dataset_id, **given(filters)}
        headers: dict[str, str] = {}
        while True:
            response = self._http.get("/v1/leaderboard", params=params, headers=headers)
            if response.status_code != 304:
                if not response.is_success:
                    raise CaptuneAPIError.from_response(response)
                headers = {"If-None-Match": response.headers["ETag"]}
                yield Leaderboard.model_validate(response.json())
            time.sleep(every)

    def compare(self, dataset_id: str, a: str, b: str, *, split: str = "test", head: str = "own") -> Comparison:
        """Two rows of the leaderboard, by their ids: the difference in accuracy on the same images."""
        params = {"dataset_id": dataset_id, "a": a, "b": b, "split": split, "head": head}
        return Comparison.model_validate(self._send("GET", "/v1/leaderboard/compare", params=params).json())
