"""Class and split names as users write them."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

from shared.clip.templates import display_name
from shared.datasets.report import listed
from shared.errors import InvalidInput

Split = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
MAX_NAME: Final = 200
_SPLITS: Final[dict[str, Split]] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_of(name: str) -> Split | None:
    """`Validation` -> `val`; None for what is no split's name."""
    return _SPLITS.get(name.strip().lower())


@lru_cache(4096)  # once per class instead of once per file
def class_name(raw: str) -> str:
    """Stripped and in composed Unicode form. Raises InvalidInput (`bad_class_name`) where no text could name it."""
    name = unicodedata.normalize("NFC", raw).strip()
    if not display_name(name) or len(name) > MAX_NAME or any(unicodedata.category(c) in {"Cc", "Cs"} for c in name):
        raise InvalidInput(
            f"'{listed([name])}' cannot name a class: use 1 to {MAX_NAME} printable characters.", code="bad_class_name"
        )
    return name


def check_distinct(names: Iterable[str]) -> None:
    """Two classes whose captions would name them alike cannot be told apart. Raises InvalidInput naming both."""
    seen: dict[str, str] = {}
    clashes: list[str] = []
    for name in sorted(set(names)):
        key = unicodedata.normalize("NFKC", display_name(name)).casefold()
        if key in seen:
            clashes.append(f"'{seen[key]}' and '{name}'")
        seen.setdefault(key, name)
    if clashes:
        raise InvalidInput(
            f"Classes differ only in case, '_', '-' or spacing: {listed(clashes)}. Merge or rename them.",
            code="class_names_collide",
        )
