"""Which runs make one row of the leaderboard: those that differ in nothing but their seeds."""

import hashlib
import json
from typing import Any


def setting_of(
    *,
    protocol: str,
    method: str,
    model: str,
    captioner: str | None,
    shots: int | None,
    hyperparameters: dict[str, Any],
    suffix: str | None,
    captions: dict[str, Any] | None,
) -> str:
    """A hash of all that a user chose but the seeds. `captions`: how they were asked for (`details["captions"]`)."""
    chosen = [protocol, method, model, captioner, shots, hyperparameters, suffix, captions]
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:32]
