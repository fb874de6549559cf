"""What several commands take, each in the same words."""

from typing import Any

import pytest

from captune import cli
from captune.commands import captions

SHOTS = [
    ("caption", "ds_1"),
    ("train", "ds_1"),
    ("sweep", "ds_1"),
    ("leaderboard", "ds_1"),
    ("bench", "mmft", "--datasets", "dtd=x"),
]


def parsed(*arguments: str) -> Any:
    return cli._parser().parse_args(arguments)


@pytest.mark.parametrize("command", SHOTS)
def test_shots_are_a_number_all_or_full_everywhere(command: tuple[str, ...]) -> None:
    many = command[0] in ("sweep", "bench")
    for text, meant in (("4", 4), ("all", None), ("full", None)):
        assert parsed(*command, "--shots", text).shots == ([meant] if many else meant)
    if many:
        assert parsed(*command, "--shots", "1, 16,all").shots == [1, 16, None]


@pytest.mark.parametrize("command", SHOTS)
@pytest.mark.parametrize("wrong", ["few", "0", "1.5", ""])
def test_shots_that_are_none_of_these_are_told_in_words(
    command: tuple[str, ...], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(*command, "--shots", wrong)
    said = capsys.readouterr().err
    assert f"argument --shots: '{wrong}' is neither a number of images per class nor 'all'" in said


def test_shots_not_given_are_left_to_the_server() -> None:
    """With --redo they are the earlier job's, so `all` and nothing said are two things."""
    assert "shots" not in captions.request_of(parsed("caption", "ds_1"))
    assert captions.request_of(parsed("caption", "ds_1", "--shots", "all"))["shots"] is None
    assert "shots" not in parsed("leaderboard", "ds_1")


@pytest.mark.parametrize(("command", "option"), [("train", "--seeds"), ("sweep", "--seeds"), ("sweep", "--shot-seeds")])
def test_seeds_are_whole_numbers(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert getattr(parsed(command, "ds_1", option, "0, 7"), option[2:].replace("-", "_")) == [0, 7]
    for wrong, named in (("a", "a"), ("0,", ""), ("0,1.5", "1.5")):
        with pytest.raises(SystemExit, match="2"):
            parsed(command, "ds_1", option, wrong)
        assert f"argument {option}: '{named}' is no whole number" in capsys.readouterr().err


def test_lists_of_names() -> None:
    assert parsed("sweep", "ds_1", "--methods", "mmft, flyp,").methods == ["mmft", "flyp"]
    assert parsed("train", "ds_1", "--exclude-flags", "").exclude_flags == [], "none, which is not the default"
    assert parsed("train", "ds_1").exclude_flags is None
    assert parsed("keys", "create", "--owner", "anna", "--scopes", "read, admin").scopes == ["read", "admin"]
