"""The commands of this machine's own server: what they take."""

import pytest

from captune import cli

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
