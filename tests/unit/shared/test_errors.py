"""shared/errors.py: what of another's error an answer repeats."""

import pytest

from shared.errors import cause


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("size mismatch for visual.proj"), "RuntimeError: size mismatch for visual.proj"),
        (ValueError("cannot read /srv/models/config.json"), "ValueError"),
        (OSError("see https://hub.example/model"), "OSError"),
        (
            FileNotFoundError(2, "No such file or directory", "/srv/models"),
            "FileNotFoundError: No such file or directory",
        ),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_librarys_error_names_no_path(error: Exception, told: str) -> None:
    assert cause(error) == told
