"""A tiny CLIP, and what a folder of a classifier is made of."""

from pathlib import Path

import pytest
import torch

from shared.clip.loading import LoadedClip, load_clip
from tests.tiny_clip import write_tiny_clip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedClip:
    return load_clip(str(tiny_folder), tiny_folder.parent, [tiny_folder.parent])
