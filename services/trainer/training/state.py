"""A run's state on disk: one safetensors file, its JSON in the header. No pickle. Replaced atomically: a reader finds
the old or the new state and never half of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import InvalidInput

FILE = "state.safetensors"
FORMAT = 2


def write_state(directory: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `directory`/state.safetensors: to a temporary name, fsynced, renamed. `tensors` must not share memory."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{FILE}.{uuid4().hex}"
    try:
        header = {"state": json.dumps({"format": FORMAT, **meta})}
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        fsync(temporary)
        os.replace(temporary, directory / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(directory)


def read_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (copied into memory) and JSON of `write_state`. Raises InvalidInput on a missing or damaged file."""
    path = directory / FILE
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InvalidInput(
            f"The saved training state {path} cannot be read ({error}). Remove it to train from the start.",
            code="state_unreadable",
        ) from error
    if meta.get("format") != FORMAT:
        raise InvalidInput(
            f"The saved training state {path} has format {meta.get('format')}, this version reads {FORMAT}. "
            "Remove it to train from the start.",
            code="state_unreadable",
        )
    return tensors, meta


def fsync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
