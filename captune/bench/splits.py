"""Splits that a release does not have, drawn per class from a recorded seed. Test images are never drawn from.

Images are ranked by a hash of seed, class and name, so a draw depends neither on the order of the lists nor on the
Python version, and a missing file moves few others."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from captune.bench.data import Entry, Reading, by_label
from shared.schemas.common import Split

VAL_SHARE: Final = 0.2  # of train


def hold_out(
    reading: Reading,
    seed: int,
    *,
    share: float = VAL_SHARE,
    most: int | None = None,
    unit: Callable[[Entry], str] = lambda entry: entry.path,
) -> None:
    """Moves `share` of each class's train images (at most `most`) to val, where the release has no val split. Images
    of one `unit` stay together; at least one unit per class goes to val and at least one stays, and a class of one
    stays whole. In place."""
    chosen: set[str] = set()
    for label, entries in by_label(entry for entry in reading.entries if entry.split == "train").items():
        units = _ranked({f"{label}/{unit(entry)}" for entry in entries}, f"val\0{seed}\0{label}")
        wanted = max(1, round(share * len(units)))
        chosen.update(units[: min(wanted, len(units) - 1, most or wanted)])
    reading.entries = [
        replace(entry, split="val") if entry.split == "train" and f"{entry.label}/{unit(entry)}" in chosen else entry
        for entry in reading.entries
    ]
    amount = f"{share:.0%} of each class" if most is None else f"{most} images of each class"
    reading.notes.append(f"the release has no val split: {amount} held out of train, drawn with seed {seed}")


def three_ways(reading: Reading, seed: int, val: float = 0.2, test: float = 0.3) -> None:
    """Train, val and test for a release without any split: shares of each class as CoOp (arXiv 2109.01134) draws them,
    but not its draw. In place."""
    places: dict[str, Split] = {}
    for label, entries in by_label(reading.entries).items():
        ranked = _ranked({entry.path for entry in entries}, f"split\0{seed}\0{label}")
        tests = min(max(1, round(test * len(ranked))), len(ranked) - 1)
        vals = min(max(1, round(val * len(ranked))), len(ranked) - 1 - tests)
        places.update(dict.fromkeys(ranked[:tests], "test"))
        places.update(dict.fromkeys(ranked[tests : tests + vals], "val"))
    reading.entries = [replace(entry, split=places.get(entry.path, "train")) for entry in reading.entries]
    reading.official = False
    reading.notes.append(
        f"the release has no splits: {1 - val - test:.0%} / {val:.0%} / {test:.0%} of each class drawn with seed "
        f"{seed}, not those of any paper; a CoOp split_zhou_*.json in the folder would decide"
    )


def cut(reading: Reading, most: int, seed: int) -> None:
    """Keeps at most `most` train images of each class, for few-shot runs on data larger than an upload. In place."""
    kept: set[str] = set()
    for label, entries in by_label(entry for entry in reading.entries if entry.split == "train").items():
        kept.update(_ranked({entry.path for entry in entries}, f"pool\0{seed}\0{label}")[:most])
    before = sum(entry.split == "train" for entry in reading.entries)
    reading.entries = [entry for entry in reading.entries if entry.split != "train" or entry.path in kept]
    reading.notes.append(f"{len(kept):,} of {before:,} train images: {most} of each class, drawn with seed {seed}")


def _ranked(names: set[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}\0{name}".encode()).digest())
