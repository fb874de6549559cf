"""Base models that a process keeps."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.clip import warm
from tests.tiny_clip import write_tiny_clip


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    warm.forget()
    yield
    warm.forget()


def test_a_model_is_loaded_once_and_anew_when_its_files_were_replaced(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "tiny", seed=0)
    first = warm.warm_clip("tiny", tmp_path, [tmp_path])
    assert warm.warm_clip("tiny", tmp_path, [tmp_path]) is first
    shutil.rmtree(tmp_path / "tiny")
    write_tiny_clip(tmp_path / "tiny", seed=1)
    second = warm.warm_clip("tiny", tmp_path, [tmp_path])
    assert second.revision != first.revision
