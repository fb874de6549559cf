"""Where the client looks for its server, and in which order."""

import json
from pathlib import Path

import pytest

from captune import connection
from captune.errors import ConnectionNotFound


@pytest.fixture(autouse=True)
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with a connection, named by the environment; nothing else is."""
    for name in ("CAPTUNE_URL", "CAPTUNE_API_KEY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPTUNE_STATE_DIR", str(tmp_path))
    file = tmp_path / connection.FILE
    file.write_text(json.dumps({"url": "http://saved", "api_key": "saved-key"}))
    return file


def found(url: str | None = None, api_key: str | None = None, state_dir: Path | None = None) -> tuple[str, str]:
    answer = connection.find(url, api_key, state_dir)
    return answer.url, answer.api_key


def test_the_file_is_last() -> None:
    assert found() == ("http://saved", "saved-key")


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTUNE_API_KEY", "env-key")
    assert found() == ("http://saved", "env-key")
    monkeypatch.setenv("CAPTUNE_URL", "http://env")
    assert found() == ("http://env", "env-key")


def test_the_saved_key_is_shown_to_the_saved_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("http://saved/") == ("http://saved", "saved-key")
    with pytest.raises(ConnectionNotFound, match="no API key for http://elsewhere"):
        connection.find("http://elsewhere")
    monkeypatch.setenv("CAPTUNE_URL", "http://elsewhere")
    with pytest.raises(ConnectionNotFound, match="set CAPTUNE_API_KEY"):
        connection.find()


def test_a_named_state_directory_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setenv("CAPTUNE_URL", "http://production")
    monkeypatch.setenv("CAPTUNE_API_KEY", "production-key")
    assert found(state_dir=saved.parent) == ("http://saved", "saved-key")


def test_arguments_go_before_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTUNE_URL", "http://env")
    monkeypatch.setenv("CAPTUNE_API_KEY", "env-key")
    assert found("http://argument") == ("http://argument", "env-key")
    assert found(api_key="argument-key") == ("http://env", "argument-key")


def test_no_file_is_needed_where_all_is_told(saved: Path) -> None:
    saved.unlink()
    assert found("http://argument", "argument-key") == ("http://argument", "argument-key")


def test_another_state_directory_can_be_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / connection.FILE).write_text(json.dumps({"url": "http://other", "api_key": "other-key"}))
    assert found(state_dir=other) == ("http://other", "other-key")


def test_nothing_found_says_what_to_do(saved: Path) -> None:
    saved.unlink()
    with pytest.raises(ConnectionNotFound, match=r"captune up.*CAPTUNE_URL") as error:
        connection.find()
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": "http://saved"}'])
def test_an_unreadable_file_is_told(saved: Path, content: str) -> None:
    saved.write_text(content)
    with pytest.raises(ConnectionNotFound, match="cannot be read"):
        connection.find()


def test_default_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert connection.default_state_dir() == tmp_path
    monkeypatch.delenv("CAPTUNE_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert connection.default_state_dir() == Path("/var/state/captune")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert connection.default_state_dir() == Path("/home/somebody/.local/state/captune")
