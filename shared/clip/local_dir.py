"""open_clip's `local-dir:` folder: the one format in which Captune keeps CLIP models.

    open_clip_config.json        {"model_cfg": {...}, "preprocess_cfg": {...}}
    open_clip_model.safetensors  every weight
    config.json, tokenizer*.json, vocab.txt, ...   only for a model with a Hugging Face text tower or tokenizer

open_clip 3.3 reads the tokenizer files from the folder itself, whatever `hf_tokenizer_name` says. `hf_model_name` it
hands to transformers as it stands: a directory (if relative, to the working directory) or a hub id. `read` therefore
points it at the folder whenever the folder holds the text tower's config.json.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import InvalidInput

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# The two names open_clip prefers over everything else; with one of them there it can't fall back to a pickled file.
ACCEPTED_WEIGHTS = (WEIGHTS, "open_clip_pytorch_model.safetensors")
# Those of open_clip's own configs. It hands all others to transformers, where some name files to be read.
TOKENIZER_OPTIONS = ("clean", "strip_sep_token")
TEXT_CONFIG = "config.json"
TOKENIZER_FILES = (
    TEXT_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def looks_local(name: str, model_roots: Sequence[Path]) -> bool:
    """Whether a model's name means a directory. Of what lies outside the roots the answer tells nothing."""
    if name.startswith(("local-dir:", "/", ".", "~/")):  # no other's "~": that would tell who has an account
        return True
    below = (_below(root / name, model_roots) for root in model_roots)
    return any(path is not None and os.path.isdir(path) for path in below)


def resolve(name: str, model_roots: Sequence[Path]) -> Path:
    """The real path of a local model directory. Raises InvalidInput unless it lies below one of `model_roots`, all
    symbolic links followed, its weights and config included (a link must not lead out of the roots)."""
    named = name.removeprefix("local-dir:")
    given = Path(os.path.expanduser(named) if named.startswith("~/") else named)
    candidates = [given] if given.is_absolute() else [root / given for root in model_roots]
    allowed = [path for each in candidates if (path := _below(each, model_roots)) is not None]
    if not allowed:
        log.info(
            "model directory %r is not below %s", name, ", ".join(map(str, model_roots)) or "any root: none is set"
        )
        raise InvalidInput(
            f"The model directory '{name}' is not below any of the directories the operator allows"
            " (CAPTUNE_MODEL_ROOTS). Put the model there and name that path.",
            code="model_not_allowed",
            param="model",
        )
    path = next((p for p in allowed if os.path.isdir(p)), None)
    if path is None:
        raise _bad(allowed[0], "there is no such directory")
    if not (path / CONFIG).is_file():
        raise _bad(path, f"{CONFIG} is missing: it must be a folder in open_clip's local-dir layout")
    weights = [path / name for name in ACCEPTED_WEIGHTS if (path / name).is_file()]
    if not weights:
        raise _bad(path, f"{WEIGHTS} is missing (pickled .bin and .pth weights are not loaded; convert to safetensors)")
    for file in path.iterdir():
        if _below(file, model_roots) is None:
            raise _bad(path, f"{file.name} is a link that leads out of the allowed directories")
    return path


def _below(path: Path, model_roots: Sequence[Path]) -> Path | None:
    """The real path, all symbolic links followed; None where it is not below a root, or can't be a path at all."""
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL in it, links in a circle
        return None
    return real if any(real.is_relative_to(root.resolve()) for root in model_roots) else None


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (config as it is on disk, text_cfg to build the model with). Raises InvalidInput on anything malformed."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        text_cfg = deepcopy(config["model_cfg"]["text_cfg"])
        vision_cfg, _ = config["model_cfg"]["vision_cfg"], config["model_cfg"]["embed_dim"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad(directory, f"{CONFIG} is not an open_clip config ({type(error).__name__}: {error})") from error
    if not isinstance(text_cfg, dict) or not isinstance(vision_cfg, dict):
        raise _bad(directory, f"{CONFIG}: text_cfg and vision_cfg must be objects")
    if "trust_remote_code" in json.dumps(config):
        raise _bad(directory, f"{CONFIG} asks for trust_remote_code, which is never allowed; remove it")
    options = text_cfg.get("tokenizer_kwargs", {})
    if not isinstance(options, dict):
        raise _bad(directory, f"{CONFIG}: tokenizer_kwargs must be an object")
    if unknown := [key for key in options if key not in TOKENIZER_OPTIONS]:
        known = ", ".join(TOKENIZER_OPTIONS)
        raise _bad(directory, f"{CONFIG}: tokenizer_kwargs has '{unknown[0]}'; it may have {known}")
    if text_cfg.get("hf_model_name"):
        text_cfg["hf_model_pretrained"] = False  # its weights are in the folder's safetensors file
        if (directory / TEXT_CONFIG).is_file():
            text_cfg["hf_model_name"] = str(directory)
    return config, text_cfg


def write(
    directory: Path, config: Mapping[str, Any], state: "Mapping[str, torch.Tensor]", tokenizer_files: Path | None
) -> None:
    """Writes a whole folder and flushes it to disk. Not atomic: write into a temporary directory and rename it.

    config: {"model_cfg", "preprocess_cfg"}; state: the model's state_dict, any device; tokenizer_files: a directory
    whose tokenizer and text-tower files are copied, or None where open_clip's own tokenizer serves."""
    from safetensors.torch import save_file  # brings torch; reading a folder needs none

    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_files is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_files / name).is_file():
                shutil.copyfile(tokenizer_files / name, directory / name)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, default=list) + "\n", encoding="utf-8")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    for file in directory.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _bad(directory: Path, reason: str) -> InvalidInput:
    log.info("model directory %s can't be loaded: %s", directory, reason)
    message = f"The model directory '{directory.name}' can't be loaded: {reason}."
    return InvalidInput(message, code="bad_model", param="model")
