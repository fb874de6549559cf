"""Where an engine's checkpoint comes from: a local folder under an allowed root, or a hub repository.

Only safetensors, JSON and tokenizer files are ever fetched: no pickles, no Python.
"""

import errno
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shared.errors import CaptuneError, InvalidInput, Unavailable

logger = logging.getLogger(__name__)

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Second copies of the same weights that some repositories carry for other loaders.
_NOT = ["consolidated*", "original/*", "onnx/*", "*/*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on this machine's disk."""

    folder: Path
    identity: str  # "<hub id>@<commit>" or "<folder name>@sha256:<digest>"
    parameters: int  # elements of all tensors as stored


def locate(model: str, model_roots: Sequence[Path]) -> Checkpoint:
    """Find `model`, downloading it if it is a hub id (`owner/name`, or `owner/name@revision` to pin it).

    An absolute path, or one that starts with `.` or `~`, is a local folder and must lie below a `model_roots` entry.
    Raises `InvalidInput` for what the operator has to change and `Unavailable` for what may pass by itself.
    """
    if model.startswith(("/", ".", "~")):
        folder = _local(model, model_roots)
        identity = f"{folder.name}@sha256:{_digest(folder)[:16]}"
    else:
        folder, identity = _download(model)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        missing = "safetensors weights" if not weights else "config.json"
        raise InvalidInput(
            f"Model {model!r} has no {missing}. Only checkpoints in safetensors format are loaded (pickled weights can "
            "run code): choose another model or convert this one.",
            code="no_safetensors" if not weights else "not_a_checkpoint",
            param="model",
        )
    return Checkpoint(folder, identity, sum(_elements(path) for path in weights))


def _local(model: str, model_roots: Sequence[Path]) -> Path:
    folder = Path(model).expanduser().resolve()
    roots = [root.resolve() for root in model_roots]
    if not _within(folder, roots):
        listed = ", ".join(map(str, roots)) or "none is set"
        raise InvalidInput(
            f"Model folder {model!r} is outside the allowed model roots ({listed}). Move it there or add its parent "
            "to CAPTUNE_MODEL_ROOTS.",
            code="model_outside_roots",
            param="model",
        )
    if not folder.is_dir():
        raise InvalidInput(f"Model folder {model!r} does not exist.", code="model_not_found", param="model")
    for file in folder.iterdir():
        if not _within(file.resolve(), roots):
            raise InvalidInput(
                f"Model folder {model!r}: {file.name} is a link that leads out of the allowed model roots. Copy "
                "the file itself there.",
                code="model_outside_roots",
                param="model",
            )
    return folder


def _within(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _download(model: str) -> tuple[Path, str]:
    repo_id, _, revision = model.partition("@")
    if not _HUB_ID.fullmatch(repo_id):
        raise InvalidInput(
            f"Model {model!r} is neither a hub id (owner/name) nor a path (start it with '/' or './').",
            code="model_not_found",
            param="model",
        )
    cache = Path(constants.HF_HUB_CACHE)
    try:
        _check_space(repo_id, revision or None, cache)
        snapshot = snapshot_download(
            repo_id, revision=revision or None, cache_dir=cache, allow_patterns=_FILES, ignore_patterns=_NOT
        )
    except Exception as error:  # the hub's HTTP client has its own family of errors, named differently by version
        raise explain(error, model) from error
    folder = Path(snapshot)
    return folder, f"{repo_id}@{folder.name}"


def _check_space(repo_id: str, revision: str | None, cache: Path) -> None:
    """Raise ENOSPC before the first byte is fetched rather than after most of them."""
    try:
        files = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=_FILES,
            ignore_patterns=_NOT,
            dry_run=True,
        )
    except DryRunError:
        return  # the hub is out of reach or refuses: the download itself falls back to the cache, or says why
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    logger.info("model %s: %.2f GB to download into %s, %.2f GB free", repo_id, needed / 1e9, cache, free / 1e9)
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free", str(cache))


def explain(error: Exception, model: str) -> CaptuneError:
    """The user-facing error for what went wrong while fetching `model` from the hub."""
    if isinstance(error, GatedRepoError):
        return InvalidInput(
            f"Model {model!r} is gated: accept its terms on the hub and give this service a token (HF_TOKEN), "
            "or choose an open model.",
            code="model_gated",
            param="model",
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return InvalidInput(
            f"Model {model!r} does not exist on the hub, or it is private and no valid token (HF_TOKEN) was given.",
            code="model_not_found",
            param="model",
        )
    if isinstance(error, RevisionNotFoundError):
        return InvalidInput(
            f"Model {model!r}: the hub has the repository, but not that revision.",
            code="model_not_found",
            param="model",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(
            f"No space to download model {model!r} ({error}). Free some, or point HF_HUB_CACHE at a larger disk.",
            code="no_space_for_model",
            param="model",
        )
    reason = "answered with an error" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    return Unavailable(
        f"Model {model!r} is not complete in the cache and the hub {reason} ({type(error).__name__}). "
        "Check the network, or download it elsewhere and give its folder as a path.",
        code="model_hub_unreachable",
        param="model",
    )


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents of every file that a load reads."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _elements(path: Path) -> int:
    """Number of tensor elements in a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"Weights file {path.name!r} is damaged or incomplete ({error}). Delete it and fetch the model again.",
            code="model_not_loadable",
            param="model",
        ) from error
