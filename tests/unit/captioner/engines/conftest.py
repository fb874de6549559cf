from pathlib import Path

import pytest

from tests import tiny_mllm


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL; not to be changed."""
    return tiny_mllm.build(tmp_path_factory.mktemp("models") / "tiny")
