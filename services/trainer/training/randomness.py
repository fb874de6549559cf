"""Every random draw of a run comes from its seed and a key such as ("order", epoch), never from a state carried along:
a resumed run draws what an undisturbed one would, and a saved state holds no generator."""

import hashlib

import torch


def derived_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed, the same in every process and version of Python."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, *key))
