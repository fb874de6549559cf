"""The commands of this machine's own server: what they take and say."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from captune import cli
from services.embedded import demo, stack

OWN = [("up",), ("demo",), ("collect",), ("backup", "folder"), ("restore", "folder")]


@pytest.mark.parametrize("command", OWN)
@pytest.mark.parametrize("option", [("--url", "http://elsewhere"), ("--api-key", "key"), ("--json",)])
def test_no_other_server_can_be_named(
    command: tuple[str, ...], option: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken and ignored, `collect --url` would remove what is here instead."""
    with pytest.raises(SystemExit, match="2"):
        cli._parser().parse_args([*command, *option])
    assert f"unrecognized arguments: {option[0]}" in capsys.readouterr().err
    assert str(cli._parser().parse_args([*command, "--state-dir", "/there"]).state_dir) == "/there"


def test_restore_says_where_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["restore", "--help"])
    assert "where to restore to" in " ".join(capsys.readouterr().out.split())


@contextmanager
def serving(status: int) -> Iterator[str]:
    """A server whose every page answers this; its URL."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def say_of_up(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    running = SimpleNamespace(url=url, api_key="key", state_dir=tmp_path, check=interrupted)
    monkeypatch.setattr(stack, "Stack", lambda *_, **__: nullcontext(running))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["up", "--state-dir", str(tmp_path)])


def say_of_demo(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = SimpleNamespace(url=url, leaderboard=lambda _: None)
    monkeypatch.setattr(demo, "_server", lambda *_: nullcontext((client, tmp_path)))
    monkeypatch.setattr(demo, "tables", SimpleNamespace(leaderboard=lambda _: ""))
    for step in ("_dataset", "_captions", "_scores", "_example"):
        monkeypatch.setattr(demo, step, lambda *_: SimpleNamespace(id="ds_1"))
    monkeypatch.setattr(demo, "_training", lambda *_: [])
    demo.run(tmp_path, 0)


@pytest.mark.parametrize("say", [say_of_up, say_of_demo])
@pytest.mark.parametrize("status", [200, 404])
def test_the_documentation_is_named_where_it_is_served(
    say: Callable[..., None], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`CAPTUNE_DOCS=off` closes it, with 404."""
    with serving(status) as url:
        say(url, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert url in printed
    assert (f"{url}/docs" in printed) == (status == 200)
    assert ("API docs" in printed) == (status == 200)
