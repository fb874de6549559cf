"""`captune bench mmft --dry-run`, and how its options are refused."""

import json
from pathlib import Path

import pytest

from captune.cli import main
from tests.unit.captune.bench.layouts import BUILD


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for name in ("dtd", "gtsrb"):
        BUILD[name](tmp_path / name)
    return {name: tmp_path / name for name in ("dtd", "gtsrb")}


def run(tmp_path: Path, *args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "mmft", "--state-dir", str(tmp_path / "no server"), *args])
    return int(ended.value.code or 0)


def test_a_dry_run_shows_what_was_read(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders["dtd"] / "images/banded/banded_0001.jpg").unlink()
    named = ",".join(f"{name}={path}" for name, path in folders.items())
    assert run(tmp_path, "--datasets", named, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "DTD in" in text
    assert "3 classes (banded, chequered, zigzagged), domain 'textures'" in text
    assert "refused: images/banded/banded_0001.jpg: the lists name it (train)" in text
    assert "test has 9 images, the whole release 1,880" in text
    assert "never within" in text
    assert "once a server is up" in text


def test_a_dry_run_in_json(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--datasets", f"dtd={folders['dtd']}", "--dry-run", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["images"] == {"train": 12, "val": 6, "test": 9}
    assert found["per_class"] == {"train": [4, 4], "val": [2, 2], "test": [3, 3]}
    assert found["classes"] == ["banded", "chequered", "zigzagged"]
    assert found["refused"] == 0
    assert found["upload_bytes"] > 27 * 1024


def test_a_pool_leaves_so_many_and_no_full(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"dtd={folders['dtd']}"
    assert run(tmp_path, "--datasets", named, "--pool", "2", "--shots", "1,2", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["images"] == {"train": 6, "val": 6, "test": 9}
    for shots in ("1,full", "1,all", "1,4"):
        assert run(tmp_path, "--datasets", named, "--pool", "2", "--shots", shots, "--dry-run") == 2
        assert "--pool 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--datasets", "dtd"], "'dtd' is not NAME=FOLDER"),
        (["--datasets", "mnist=/data"], "there is no data set 'mnist'; there are dtd, flowers102"),
        (["--datasets", "dtd=/a,dtd=/b"], "'dtd' is given twice"),
        (["--datasets", "dtd=/nowhere/at/all"], "is no folder"),
        (["--datasets", "dtd=/a", "--shots", "1,few"], "'few' is neither a number of images per class nor 'all'"),
        (["--datasets", "dtd=/a", "--shots", "0"], "'0' is neither"),
        (["--datasets", "dtd=/a", "--seeds", "0"], "'0' is no number from 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *args) == 2
    assert message in capsys.readouterr().err


def test_without_a_server_nothing_is_run(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--datasets", f"dtd={folders['dtd']}") == 3
    assert "captune up" in capsys.readouterr().err
