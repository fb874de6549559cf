"""`captune leaderboard` and `captune compare` against a server that answers from a list."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from captune import Client, cli
from captune.commands import leaderboard
from tests.unit.captune.test_tables import row

Answer = Callable[[httpx.Request], httpx.Response]
SETTINGS = ["aaaa1111", "aaaa2222", "bbbb3333", "bbbb3333.few_shot"]


def page(rows: list[Any], more: bool = False) -> dict[str, Any]:
    return {
        **{"dataset_id": "ds_1", "dataset_name": "pets", "data_fingerprint": "f", "split": "test", "metric": "top1"},
        **{"unit": "fraction", "higher_is_better": True, "rows": [each.model_dump() for each in rows]},
        **{"has_more": more, "last_id": rows[-1].id if rows else None},
    }


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[httpx.Request]]:
    """Every Client talks to `answer`; what it asked is in the list."""

    def use(answer: Answer) -> list[httpx.Request]:
        asked: list[httpx.Request] = []

        def handle(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return answer(request)

        made = Client.__init__

        def connect(self: Client, *_: Any, **__: Any) -> None:
            made(self, "http://server", "key")
            self._http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(handle))

        monkeypatch.setattr(Client, "__init__", connect)
        monkeypatch.setattr("time.sleep", lambda _: None)
        return asked

    return use


def run(*arguments: str) -> int:
    args = cli._parser().parse_args(list(arguments))
    code: int = args.run(args)
    return code


def test_all_pages_make_one_table(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(id=f"{i:08d}", rank=i + 1) for i in range(3)]
    asked = serve(
        lambda request: httpx.Response(
            200, json=page(rows[2:]) if "after" in request.url.params else page(rows[:2], more=True)
        )
    )
    assert run("leaderboard", "ds_1", "--shots", "4", "--group", "grp_1", "--metric", "nll") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-3:]] == [each.id for each in rows]
    assert dict(asked[0].url.params) == {
        **{"dataset_id": "ds_1", "metric": "nll", "split": "test", "head": "own", "shots": "4"},
        **{"group_id": "grp_1", "limit": "1000"},
    }
    assert asked[1].url.params["after"] == rows[1].id


def test_a_limit_asks_for_one_page(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = serve(lambda _: httpx.Response(200, json=page([row()], more=True)))
    assert run("leaderboard", "ds_1", "--limit", "1", "--format", "json", "--shots", "all") == 0
    assert json.loads(capsys.readouterr().out)["has_more"] is True
    (request,) = asked
    assert (request.url.params["limit"], request.url.params["shots"]) == ("1", "full")


@pytest.mark.parametrize("format", ["csv", "markdown", "latex"])
def test_other_formats_are_printed_as_they_come(serve: Any, capsys: pytest.CaptureFixture[str], format: str) -> None:
    asked = serve(lambda _: httpx.Response(200, text="a,b\r\n"))
    assert run("leaderboard", "ds_1", "--format", format) == 0
    assert asked[0].url.params["format"] == format
    assert capsys.readouterr().out.startswith("a,b")


def test_rows_that_a_text_leaves_out_are_told_beside_it(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    link = {"Link": '</v1/leaderboard?dataset_id=ds_1&after=aaaa1111>; rel="next"'}
    serve(lambda request: httpx.Response(200, text="a,b\r\n", headers=link if "tag" in request.url.params else {}))
    assert run("leaderboard", "ds_1", "--format", "csv", "--tag", "x") == 0
    printed = capsys.readouterr()
    assert printed.out == "a,b\r\n", "as it came, for a file"
    assert "there are more rows than these" in printed.err
    run("leaderboard", "ds_1", "--format", "csv")
    assert capsys.readouterr().err == ""


def test_watching_asks_with_the_tag_and_shows_what_changed(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers: Iterator[httpx.Response] = iter(
        [
            httpx.Response(200, json=page([row(method="first")]), headers={"ETag": '"1"'}),
            httpx.Response(304, headers={"ETag": '"1"'}),
            httpx.Response(200, json=page([row(method="second")]), headers={"ETag": '"2"'}),
            httpx.Response(403, json={"title": "no", "detail": "no more", "status": 403, "code": "forbidden"}),
        ]
    )
    asked = serve(lambda _: next(answers))
    with pytest.raises(Exception, match="no more"):
        run("leaderboard", "ds_1", "--watch")
    shown = capsys.readouterr().out
    assert (shown.count("first"), shown.count("second")) == (1, 1)
    assert [request.headers.get("If-None-Match") for request in asked] == [None, '"1"', '"1"', '"2"']
    with pytest.raises(ValueError, match="leave out --format csv"):
        run("leaderboard", "ds_1", "--watch", "--format", "csv")


def test_rows_are_compared_by_the_beginning_of_their_ids(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        **{"dataset_id": "ds_1", "split": "val", "a": "a", "b": "b", "images": 100, "pairs": 3, "mean_a": 0.7},
        **{"mean_b": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.001, "resamples": 2000},
        **{"only_a": 0.2, "only_b": 0.1},
    }

    def answer(request: httpx.Request) -> httpx.Response:
        rows = [row(id=id) for id in SETTINGS]
        return httpx.Response(200, json=found if request.url.path.endswith("/compare") else page(rows))

    asked = serve(answer)
    assert run("compare", "ds_1", "aaaa1", "bbbb", "--split", "val") == 0
    assert "+10.00 points" in capsys.readouterr().out
    assert dict(asked[-1].url.params) == {
        **{"dataset_id": "ds_1", "a": "aaaa1111", "b": "bbbb3333", "split": "val", "head": "own"},
    }


@pytest.mark.parametrize(("start", "why"), [("aaaa", "could be aaaa1111, aaaa2222"), ("cc", "no row's id begins")])
def test_a_beginning_must_fit_one_row(serve: Any, start: str, why: str) -> None:
    serve(lambda _: httpx.Response(200, json=page([row(id=id) for id in SETTINGS])))
    args = argparse.Namespace(dataset_id="ds_1", split="test", head="own")
    with pytest.raises(ValueError, match=why):
        leaderboard.row_ids(Client("http://server", "key"), args, start)
