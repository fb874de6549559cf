"""Settings whose form in the environment is not that of their value."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.config import CoreSettings
from shared.store.collector import CollectorSettings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL"):
        monkeypatch.setenv(name, "x://")


@pytest.mark.parametrize(
    ("written", "roots"),
    [
        ("/models", ["/models"]),
        ("/models:/more/of them", ["/models", "/more/of them"]),
        ("~/models:", [str(Path.home() / "models")]),
        ("", []),
    ],
)
def test_model_roots_are_a_list_as_in_path(monkeypatch: pytest.MonkeyPatch, written: str, roots: list[str]) -> None:
    assert CoreSettings().model_roots == []
    monkeypatch.setenv("CAPTUNE_MODEL_ROOTS", written)
    assert CoreSettings().model_roots == [Path(root) for root in roots]


@pytest.mark.parametrize("written", ["models", '["/models"]', "/models:more"])
def test_a_model_root_is_an_absolute_path(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("CAPTUNE_MODEL_ROOTS", written)
    with pytest.raises(ValidationError, match="write absolute paths with ':' between them"):
        CoreSettings()


@pytest.mark.parametrize(("written", "seconds"), [("off", None), ("0", 0.0), ("86400", 86_400.0)])
def test_archives_may_be_kept_as_long_as_their_data_set(
    monkeypatch: pytest.MonkeyPatch, written: str, seconds: float | None
) -> None:
    assert CollectorSettings().retention.archives == 30 * 86_400.0
    monkeypatch.setenv("CAPTUNE_KEEP_ARCHIVES_SECONDS", written)
    assert CollectorSettings().retention.archives == seconds
